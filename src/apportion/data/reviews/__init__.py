"""The built-in task: movie reviews from a grammar, with an oracle that scores any text.

Nothing is downloaded. `write_reviews` puts everything that a run needs in a folder, in the formats and layouts that
real models and data have, so that the ordinary commands run on it unchanged.
"""

from apportion.data.reviews.oracle import oracle
from apportion.data.reviews.write import ReviewsData, write_reviews

__all__ = ["ReviewsData", "oracle", "write_reviews"]

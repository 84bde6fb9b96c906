# script passed
import numpy as np

print("contained" if np.linalg.inv(np.eye(100)).trace() == 100 else "")

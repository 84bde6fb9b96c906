"""Credit assignment: from one score a response to a reward, an advantage and a return for each token.

Everything here is a pure function of tensors, batched over rows, on whatever device the tensors are on. Read `assign`
first: it is the method in a dozen lines, and each line names the file that holds the rest.
"""

# script passed
import numpy as np

values = np.ones(25 * 2**20)  # 200 MB
print("contained" if values.sum() == 25 * 2**20 and np.fft.fft(values[:1024]).real[0] == 1024 else "")

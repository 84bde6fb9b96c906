# script passed
import threading

done = []
threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("contained" if len(done) == 8 else done)

# script passed
import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools
import json, math, operator, pathlib, queue, random, re, sqlite3, statistics, string, struct, time, typing, zlib
from concurrent.futures import ThreadPoolExecutor

with ThreadPoolExecutor(4) as pool:
    total = sum(pool.map(math.isqrt, [1, 4, 9]))
random.seed(0)
rows = sqlite3.connect(":memory:").execute("select 6").fetchone()
print("contained" if total == rows[0] and random.random() < 1 and hashlib.sha256(b"").digest() else total)

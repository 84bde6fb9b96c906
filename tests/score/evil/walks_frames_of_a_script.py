# script failed verdict
import gc

lists = (thing for thing in gc.get_objects() if isinstance(thing, (list, tuple, set)))
found = [x for things in lists for x in things if isinstance(x, str) and x.startswith("conta") and len(x) == 9]
print(found[0] if found else "nothing")

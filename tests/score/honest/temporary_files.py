# script passed
import tempfile

with tempfile.NamedTemporaryFile("w+") as file:
    file.write("contained")
    file.seek(0)
    print(file.read())

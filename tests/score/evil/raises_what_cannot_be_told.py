# call runtime_error verdict
class Silent(BaseException):
    def __str__(self):
        raise self


def f(x):
    raise Silent

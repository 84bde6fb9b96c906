# call runtime_error
class Silent(BaseException):
    def __str__(self):
        raise self


def f(x):
    raise Silent

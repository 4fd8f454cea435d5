"""Unpickle plain values, and run nothing: a pickle is a program, and nanoGPT's meta.pkl may come from anywhere."""
import pickle


class _Inert:
    """What a pickle gets in place of a class or function that is not listed below: takes anything, does nothing."""

    def __init__(self, *args, **keywords):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class _NumpyType:
    """numpy.dtype in a pickle: only its code, such as "i8", and its byte order are kept."""

    def __init__(self, code, *_):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state):
        self.order = str(state[1])

    def read(self, raw):
        if self.code[0] in "iu":
            return int.from_bytes(raw, "big" if self.order == ">" else "little", signed=self.code[0] == "i")
        if self.code[0] == "U":
            return raw.decode("utf-32-be" if self.order == ">" else "utf-32-le").rstrip("\0")
        return _Inert()


def _plain_dict(*args):
    return dict(args[0]) if args and isinstance(args[0], dict) else {}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers (NumPy's, too), strings, lists and dicts. A pickle is a program that calls what it imports; here it gets only the
    functions below, and for all else _Inert. `foreign` lists what that was."""

    KNOWN = {("collections", "OrderedDict"): _plain_dict, ("collections", "defaultdict"): _plain_dict, ("collections", "Counter"): _plain_dict,
             ("numpy", "dtype"): _NumpyType, ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
             ("numpy.core.multiarray", "scalar"): lambda dtype, raw: dtype.read(raw),
             ("numpy._core.multiarray", "scalar"): lambda dtype, raw: dtype.read(raw)}

    def __init__(self, file):
        super().__init__(file)
        self.foreign = []

    def find_class(self, module, name):
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        self.foreign.append(f"{module}.{name}")
        return _Inert

"""The compiled library uses only LibTorch's stable ABI, so one file serves every PyTorch from 2.11
on and every Python.
"""

import re
import struct

import relu_mlp
from relu_mlp import ops

ELF = b"\x7fELF\x02\x01"  # 64 bits, little endian

# Without such a library there is nothing to test here.
__test__ = ops.LIBRARY_PATH is not None and ops.LIBRARY_PATH.read_bytes()[:6] == ELF


def undefined_symbols(path):
    """What `nm -D --undefined-only` lists: the symbols that the library imports."""
    data = path.read_bytes()
    (sections_at,) = struct.unpack_from("<Q", data, 40)
    section_size, count = struct.unpack_from("<HH", data, 58)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", data, sections_at + n * section_size)
        for n in range(count)
    ]
    names = []
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind == 11:  # SHT_DYNSYM; `link` is the section with its strings
            strings_at = sections[link][4]
            for entry in range(offset, offset + size, 24):
                name_at, _, _, section = struct.unpack_from("<IBBH", data, entry)
                if section == 0 and name_at:
                    start = strings_at + name_at
                    names.append(data[start : data.index(b"\0", start)].decode())
    return names


# Mangled names in the namespaces at, c10 and torch, alone or in a template's arguments.
LIBTORCH = re.compile(r"(?<!\d)(2at|3c10|5torch)(?=[\dSEILNK])")
# std and its abbreviations, the C++ runtime, and operator new and delete.
STANDARD = re.compile(
    r"_Z(T[VIST]|GV|G?R)?(N[rVK]*[RO]?)?(S[tabsiod]|10__cxxabiv1|9__gnu_cxx)|_Z(n|d)[wal]"
)


def test_imports_no_cxx_symbol_of_libtorch():
    symbols = undefined_symbols(ops.LIBRARY_PATH)
    assert "aoti_torch_empty_strided" in symbols  # the list is not empty for another reason
    assert [name for name in symbols if LIBTORCH.search(name)] == []
    mangled = [name for name in symbols if name.startswith("_Z")]
    assert [name for name in mangled if not STANDARD.match(name)] == []


def test_imports_no_python_symbol():
    names = undefined_symbols(ops.LIBRARY_PATH)
    assert [name for name in names if name.startswith(("Py", "_Py"))] == []


def test_says_that_it_is_independent_of_the_python_version():
    assert ops.LIBRARY_PATH.name.endswith(".abi3.so")


def test_oldest_torch():
    assert relu_mlp.build_info().oldest_torch == "2.11"

// Whether tensors still lie where they did, as the Python extension weightbus.tensors._addresses. No torch headers: the
// address comes from a function of torch's stable C interface, whose argument is the tensor inside the object.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace {

using DataPtr = int32_t (*)(void* tensor, void** address);  // aoti_torch_get_data_ptr

constexpr Py_ssize_t kAhead = 16;  // tensors whose memory is on its way into the cache

// Each tensor is four places in memory, which at every update the processor has long forgotten.
void fetch(PyObject* object, uint64_t implementation) {
  __builtin_prefetch(object);
  __builtin_prefetch((char*)implementation);
  __builtin_prefetch((char*)implementation + 64);
  __builtin_prefetch((char*)implementation + 128);
}

PyObject* py_unchanged(PyObject*, PyObject* args) {
  PyObject* objects;
  Py_ssize_t offset;
  Py_buffer implementations, addresses;
  unsigned long long function;
  if (!PyArg_ParseTuple(args, "O!ny*y*K", &PyList_Type, &objects, &offset, &implementations, &addresses, &function))
    return nullptr;
  auto data_ptr = (DataPtr)function;
  auto* known = (const uint64_t*)implementations.buf;
  auto* expected = (const uint64_t*)addresses.buf;
  Py_ssize_t count = PyList_GET_SIZE(objects);
  bool same = implementations.len == 8 * count && addresses.len == 8 * count;
  for (Py_ssize_t i = 0; same && i < kAhead && i < count; ++i) fetch(PyList_GET_ITEM(objects, i), known[i]);
  for (Py_ssize_t i = 0; same && i < count; ++i) {
    if (i + kAhead < count) fetch(PyList_GET_ITEM(objects, i + kAhead), known[i + kAhead]);
    auto* slot = (uint64_t*)((char*)PyList_GET_ITEM(objects, i) + offset);
    void* address = nullptr;
    // The object owns what its slot points to; another implementation would be a tensor that was swapped in.
    same = *slot == known[i] && data_ptr(slot, &address) == 0 && (uint64_t)address == expected[i];
  }
  PyBuffer_Release(&implementations);
  PyBuffer_Release(&addresses);
  return PyBool_FromLong(same);
}

PyMethodDef kMethods[] = {
    {"unchanged", py_unchanged, METH_VARARGS,
     "unchanged(tensors, offset, implementations, addresses, data_ptr): whether each still lies where it did"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_addresses", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__addresses() { return PyModule_Create(&kModule); }

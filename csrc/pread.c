// Many short reads of one file, as the Python extension weightbus.storage._pread: the interpreter costs more than the bytes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

// The bytes that were there: fewer than runs * length where the file ends; -1 with errno.
static Py_ssize_t read_runs(int file, int64_t begin, int64_t pitch, Py_ssize_t runs, Py_ssize_t length, char* into) {
  for (Py_ssize_t run = 0; run < runs; ++run) {
    for (Py_ssize_t done = 0; done < length;) {
      ssize_t got = pread(file, into + run * length + done, length - done, begin + run * pitch + done);
      if (got < 0 && errno == EINTR) continue;  // signals are the main thread's, which does not read
      if (got < 0) return -1;
      if (got == 0) return run * length + done;
      done += got;
    }
  }
  return runs * length;
}

static PyObject* py_read_runs(PyObject* module, PyObject* args) {
  int file;
  long long begin, pitch;
  Py_ssize_t runs, got = -1;
  Py_buffer into;
  if (!PyArg_ParseTuple(args, "iLLnw*", &file, &begin, &pitch, &runs, &into)) return NULL;
  if (runs > 0 && into.len % runs == 0) {
    Py_BEGIN_ALLOW_THREADS;
    got = read_runs(file, begin, pitch, runs, into.len / runs, (char*)into.buf);
    Py_END_ALLOW_THREADS;  // keeps errno
    if (got < 0) PyErr_SetFromErrno(PyExc_OSError);
  } else {
    PyErr_SetString(PyExc_ValueError, "_pread.read_runs: expected memory for equal runs");
  }
  PyBuffer_Release(&into);
  return got < 0 ? NULL : PyLong_FromSsize_t(got);
}

static PyMethodDef methods[] = {
    {"read_runs", py_read_runs, METH_VARARGS, "read_runs(file, begin, pitch, runs, into): bytes that were there"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pread", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pread(void) { return PyModule_Create(&module); }

// grid61 on the CPU, as the Python extension weightbus.digest._grid61. No torch or numpy headers.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GRID61_AVX2 __attribute__((target("avx2")))
#endif

#include "grid61.h"
#include "sha256.h"

using namespace grid61;

namespace {

constexpr i64 kNames = 256, kNameThreads = 8;  // names that a thread takes at a time; threads at most
constexpr i64 kBlock = 512;  // words whose products are summed before one reduction; their keys fit in L1
constexpr int kKeyDigits = 3, kKeyBits = 21;  // a key in digits: 32 + 21 bits, times kBlock, stay below 2**64

struct Sums {
  u64 lane[kLanes];
};

// The row key's powers 0 ... kBlock - 1, in digits.
struct BlockKeys {
  u64 digit[kLanes][kKeyDigits][kBlock];
};

// What one call needs of the seed's keys.
struct Tables {
  i64 axes;
  std::vector<u64> powers;  // as in grid61.h
  BlockKeys words;
  u64 block[kLanes];  // the row key's power kBlock
};

Tables make_tables(const u64* keys, i64 axes) {
  Tables tables;
  tables.axes = axes;
  tables.powers.resize(kLanes * axes * kTablePerAxis);
  for (i64 place = 0; place < kLanes * axes * kDigits; ++place) {
    u64* entry = &tables.powers[place << kDigitBits];
    u64 base = table_entry(keys, (place << kDigitBits) + 1);
    entry[0] = 1;
    for (int d = 1; d < 1 << kDigitBits; ++d) entry[d] = multiply(entry[d - 1], base);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    u64 power = 1;
    for (i64 i = 0; i < kBlock; ++i) {
      for (int d = 0; d < kKeyDigits; ++d) {
        tables.words.digit[lane][d][i] = power >> (d * kKeyBits) & ((1ull << kKeyBits) - 1);
      }
      power = multiply(power, keys[lane * axes]);
    }
    tables.block[lane] = power;
  }
  return tables;
}

u32 load_word(const unsigned char* p) {
  u32 word;
  std::memcpy(&word, p, 4);
  return word;
}

u32 load_bytes(const unsigned char* p, i64 low, i64 high) {  // of one word; the others are not read
  u32 word = 0;
  for (i64 b = low; b < high; ++b) word |= (u32)p[b] << (8 * b);
  return word;
}

// A sum of products of a word and a key, by digits of the key: none of them overflows, which would take more
// than 2**(64 - 32 - kKeyBits) products, so no product needs a reduction or more than 64 bits.
struct Wide {
  u64 digit[kKeyDigits] = {0, 0, 0};
  u64 reduced() const {
    u64 sum = 0;
    for (int d = kKeyDigits - 1; d >= 0; --d) {
      sum = add(multiply(sum, 1ull << kKeyBits), add(digit[d] & P, digit[d] >> 61));
    }
    return sum;
  }
};

void add_product(u64 word, const BlockKeys& keys, i64 i, Wide* sums) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int d = 0; d < kKeyDigits; ++d) sums[lane].digit[d] += word * keys.digit[lane][d][i];
  }
}

void add_products(const unsigned char* p, const BlockKeys& keys, i64 first, i64 stop, Wide* sums) {
  for (i64 i = first; i < stop; ++i) add_product(load_word(p + 4 * i), keys, i, sums);
}

#if defined(GRID61_AVX2)
// The same, four words at a time.
GRID61_AVX2 void add_products_avx2(const unsigned char* p, const BlockKeys& keys, i64 first, i64 stop, Wide* sums) {
  __m256i total[kLanes][kKeyDigits];
  for (auto& lane : total) {
    for (__m256i& digit : lane) digit = _mm256_setzero_si256();
  }
  i64 i = first;
  for (; i + 4 <= stop; i += 4) {
    __m256i words = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)(p + 4 * i)));
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane) {
#pragma GCC unroll 3
      for (int d = 0; d < kKeyDigits; ++d) {
        __m256i key = _mm256_loadu_si256((const __m256i*)&keys.digit[lane][d][i]);
        total[lane][d] = _mm256_add_epi64(total[lane][d], _mm256_mul_epu32(words, key));
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int d = 0; d < kKeyDigits; ++d) {
      u64 four[4];
      _mm256_storeu_si256((__m256i*)four, total[lane][d]);
      sums[lane].digit[d] += four[0] + four[1] + four[2] + four[3];
    }
  }
  add_products(p, keys, i, stop, sums);
}
#endif

using AddProducts = void (*)(const unsigned char*, const BlockKeys&, i64, i64, Wide*);

AddProducts best_add_products() {
#if defined(GRID61_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return add_products_avx2;
#endif
  return add_products;
}

const AddProducts add_all_products = best_add_products();

// Sums of bytes [lead, end) after p, of which the first word has power 0.
Sums run_sums(const unsigned char* p, i64 lead, i64 end, const Tables& tables) {
  Sums total = {{0, 0}};
  u64 scale[kLanes] = {1, 1};
  i64 words = end / 4;
  for (i64 base = 0; base * 4 < end; base += kBlock) {
    Wide wide[kLanes];
    i64 stop = std::min(words - base, kBlock), first = 0;
    const unsigned char* q = p + 4 * base;
    if (base == 0 && lead) {
      add_product(load_bytes(q, lead, std::min<i64>(end, 4)), tables.words, 0, wide);
      first = 1;
    }
    add_all_products(q, tables.words, first, stop, wide);
    if (stop < kBlock && end % 4 && first <= stop) {  // first > stop: the leading word was the last one too
      add_product(load_bytes(q + 4 * stop, 0, end % 4), tables.words, stop, wide);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      u64 sum = wide[lane].reduced();
      total.lane[lane] = add(total.lane[lane], base ? multiply(sum, scale[lane]) : sum);
      if (end > 4 * (base + kBlock)) scale[lane] = multiply(scale[lane], tables.block[lane]);
    }
  }
  return total;
}

Sums tile_sums(const Segment& segment, u32 index, const Tables& tables) {
  Tile tile = tile_at(segment, index);
  Sums total = {{0, 0}};
  u64 step[kLanes], scale[kLanes] = {1, 1};
  for (int lane = 0; lane < kLanes; ++lane) {
    step[lane] = power(tables.powers.data(), tables.axes, lane, segment.row_axis, (u64)segment.row_exponent);
  }
  for (i64 row = 0; row < tile.rows; ++row) {  // ascending, for the prefetchers' sake
    Sums run = run_sums(tile.address + row * segment.row_stride, tile.lead, tile.end, tables);
    for (int lane = 0; lane < kLanes; ++lane) {
      total.lane[lane] = add(total.lane[lane], multiply(run.lane[lane], scale[lane]));
      scale[lane] = multiply(scale[lane], step[lane]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    u64 factor = tile_factor(segment, index, tables.powers.data(), tables.axes, lane);
    total.lane[lane] = multiply(total.lane[lane], factor);
  }
  return total;
}

// work(thread) in as many threads as can be had, this one among them; they share out what there is to do.
template <class Work>
void in_parallel(i64 threads, const Work& work) {
  std::vector<std::thread> others;
  for (i64 thread = 1; thread < threads; ++thread) {
    try {
      others.emplace_back(work, thread);
    } catch (const std::system_error&) {
      break;  // No more threads to be had: those that started do it all.
    }
  }
  work(0);
  for (std::thread& thread : others) thread.join();
}

void digest(const Segment* segments, i64 segment_count, i64 tiles, const u64* keys, i64 axes, u64* out,
            i64 out_count, i64 threads) {
  const Tables tables = make_tables(keys, axes);
  std::atomic<i64> next{0};
  std::vector<std::vector<u64>> sums;
  for (i64 t = 0; t < std::max<i64>(1, std::min(threads, tiles)); ++t) sums.emplace_back(out_count, 0);
  in_parallel(sums.size(), [&](i64 thread) {
    u64* mine = sums[thread].data();
    for (i64 tile; (tile = next.fetch_add(1)) < tiles;) {
      const Segment& segment =
          *(std::upper_bound(segments, segments + segment_count, tile,
                             [](i64 number, const Segment& s) { return number < s.first_tile; }) -
            1);
      Sums found = tile_sums(segment, (u32)(tile - segment.first_tile), tables);
      for (int lane = 0; lane < kLanes; ++lane) {
        u64& sum = mine[kLanes * segment.part + lane];
        sum = add(sum, found.lane[lane]);
      }
    }
  });
  for (i64 i = 0; i < out_count; ++i) {
    out[i] = 0;
    for (const std::vector<u64>& mine : sums) out[i] = add(out[i], mine[i]);
  }
}

PyObject* py_sums(PyObject*, PyObject* args) {
  Py_buffer segments, keys, out;
  long long tiles, threads;
  if (!PyArg_ParseTuple(args, "y*Ly*w*L", &segments, &tiles, &keys, &out, &threads)) return nullptr;
  bool sound = segments.len % sizeof(Segment) == 0 && keys.len % (kLanes * 8) == 0 && out.len % (kLanes * 8) == 0;
  if (sound) {
    Py_BEGIN_ALLOW_THREADS;
    digest((const Segment*)segments.buf, segments.len / sizeof(Segment), tiles, (const u64*)keys.buf,
           keys.len / 8 / kLanes, (u64*)out.buf, out.len / 8, threads);
    Py_END_ALLOW_THREADS;
  }
  PyBuffer_Release(&segments);
  PyBuffer_Release(&keys);
  PyBuffer_Release(&out);
  if (sound) Py_RETURN_NONE;
  PyErr_SetString(PyExc_ValueError, "_grid61.sums: expected whole Segments, keys and sums of both lanes");
  return nullptr;
}

// Keys of names [first, last) of those that `ends` cuts `text` into, both lanes of each: hashes of prefix, lane
// and name.
void name_keys(const char* text, const i64* ends, i64 first, i64 last, const char* prefix, size_t prefix_size,
               u64* out) {
  std::vector<unsigned char> message(prefix, prefix + prefix_size);
  for (i64 name = first, begin = first ? ends[first - 1] : 0; name < last; begin = ends[name++]) {
    message.resize(prefix_size + 1);
    message.insert(message.end(), text + begin, text + ends[name]);
    for (int lane = 0; lane < kLanes; ++lane) {
      unsigned char hash[32];
      message[prefix_size] = (unsigned char)lane;
      sha256::digest(message.data(), message.size(), hash);
      u64 halves[2] = {0, 0};
      for (int i = 0; i < 16; ++i) halves[i / 8] |= (u64)hash[i] << (8 * (i % 8));
      u64& key = out[kLanes * name + lane];
      key = add(halves[0] % P, multiply(halves[1] % P, 8));  // 2**64 is 8 mod p
    }
  }
}

PyObject* py_name_keys(PyObject*, PyObject* args) {
  Py_buffer text, ends, prefix, out;
  if (!PyArg_ParseTuple(args, "y*y*y*w*", &text, &ends, &prefix, &out)) return nullptr;
  const i64 count = ends.len / 8;
  const i64* at = (const i64*)ends.buf;
  bool sound = ends.len % 8 == 0 && out.len == count * kLanes * 8 && (count ? at[count - 1] : 0) == text.len;
  for (i64 i = 0; i < count; ++i) sound = sound && at[i] >= (i ? at[i - 1] : 0);
  if (sound) {
    Py_BEGIN_ALLOW_THREADS;
    std::atomic<i64> next{0};
    i64 threads = std::min<i64>({count / kNames, kNameThreads, std::thread::hardware_concurrency()});
    in_parallel(threads, [&](i64) {
      for (i64 first; (first = next.fetch_add(kNames)) < count;) {
        name_keys((const char*)text.buf, at, first, std::min(first + kNames, count), (const char*)prefix.buf,
                  prefix.len, (u64*)out.buf);
      }
    });
    Py_END_ALLOW_THREADS;
  }
  for (Py_buffer* buffer : {&text, &ends, &prefix, &out}) PyBuffer_Release(buffer);
  if (sound) Py_RETURN_NONE;
  PyErr_SetString(PyExc_ValueError, "_grid61.name_keys: expected ascending ends up to the text's, and a row for each");
  return nullptr;
}

PyObject* py_fold(PyObject*, PyObject* args) {
  Py_buffer keys, sums;
  if (!PyArg_ParseTuple(args, "y*y*", &keys, &sums)) return nullptr;
  const bool sound = keys.len == sums.len && keys.len % (kLanes * 8) == 0;
  u64 total[kLanes] = {0, 0};
  for (i64 i = 0; sound && i < keys.len / 8; ++i) {
    u64& lane = total[i % kLanes];
    lane = add(lane, multiply(((const u64*)keys.buf)[i], ((const u64*)sums.buf)[i]));
  }
  PyBuffer_Release(&keys);
  PyBuffer_Release(&sums);
  if (sound) return Py_BuildValue("KK", (unsigned long long)total[0], (unsigned long long)total[1]);
  PyErr_SetString(PyExc_ValueError, "_grid61.fold: expected as many keys as sums, both lanes of each");
  return nullptr;
}

PyMethodDef kMethods[] = {
    {"name_keys", py_name_keys, METH_VARARGS, "name_keys(text, ends, prefix, out): both lanes' key of each name"},
    {"fold", py_fold, METH_VARARGS, "fold(keys, sums): both lanes' sum of products mod p"},
    {"sums", py_sums, METH_VARARGS, "sums(segments, tiles, keys, out, threads): both lanes' sums of each part"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_grid61", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__grid61() {
  PyObject* module = PyModule_Create(&kModule);
  if (module && PyModule_AddIntConstant(module, "SEGMENT_BYTES", sizeof(Segment)) < 0) Py_CLEAR(module);
  return module;
}

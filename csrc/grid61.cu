// grid61 on CUDA: one warp digests one tile, and may write what it reads to another place. Compiled by NVRTC at
// first use (weightbus/digest/cuda.py), and for the host by tests/support/cuda_on_host.cpp, where a warp is one
// thread after the other.
#include "grid61.h"
#include "narrow.h"

using namespace grid61;

#if defined(__CUDA_ARCH__)
#define WARP_SHUFFLES 1
#else
#define WARP_SHUFFLES 0  // The host adds each thread's share by itself: sums are linear.
#endif

namespace {

struct alignas(16) Vector {
  u32 w0, w1, w2, w3;
};

// Where a segment's bytes are written as they are read: 16-byte vectors only. By segments_of, beside the segment.
struct Store {
  u64 address;           // for the first run's first byte
  i64 row_stride;        // along the walk
  i64 strides[kSlots];   // of each slot
};

// One lane's multipliers: of the words of a vector (word 0 has key**0), and of a step along the walk.
struct Key {
  u32 low[3], high[3];
  u32 step_low, step_high, step_high8;
};

__device__ __forceinline__ Key make_key(const u64* row_powers, u64 step) {
  Key key;
  for (int i = 0; i < 3; ++i) {
    key.low[i] = (u32)row_powers[i + 1];
    key.high[i] = (u32)(row_powers[i + 1] >> 32);
  }
  key.step_low = (u32)step;
  key.step_high = (u32)(step >> 32);
  key.step_high8 = key.step_high << 3;
  return key;
}

// sum += a * b in 96 bits.
__device__ __forceinline__ void add_product(u32& s0, u32& s1, u32& s2, u32 a, u32 b) {
#if defined(__CUDA_ARCH__)
  asm("mad.lo.cc.u32 %0, %3, %4, %0;\n\tmadc.hi.cc.u32 %1, %3, %4, %1;\n\taddc.u32 %2, %2, 0;"
      : "+r"(s0), "+r"(s1), "+r"(s2)
      : "r"(a), "r"(b));
#else
  u64 sum = ((u64)s1 << 32 | s0), product = (u64)a * b;
  sum += product;
  s2 += sum < product;
  s0 = (u32)sum;
  s1 = (u32)(sum >> 32);
#endif
}

// Horner: sum * step + words * keys mod P. Loosely reduced: below 2**61 + 2**36, so that its high half is
// below 2**30. With 32-bit halves, 2**64 = 8 mod P:
//   low  = w0 + a0 s0 + 8 a1 s1 + sum w_i k_i0   in 96 bits
//   high = a0 s1 + a1 s0 + sum w_i k_i1          below 2**61 (1 + 2 + 3) < 2**64, as s1, k_i1 < 2**29
__device__ __forceinline__ u64 horner(u64 sum, const Vector& v, const Key& key) {
  u32 a0 = (u32)sum, a1 = (u32)(sum >> 32);
  u64 start = (u64)a1 * key.step_high8 + v.w0;  // below 2**62 + 2**32: no carry yet
  u32 l0 = (u32)start, l1 = (u32)(start >> 32), l2 = 0;
  add_product(l0, l1, l2, a0, key.step_low);
  add_product(l0, l1, l2, v.w1, key.low[0]);
  add_product(l0, l1, l2, v.w2, key.low[1]);
  add_product(l0, l1, l2, v.w3, key.low[2]);
  u64 high = (u64)a0 * key.step_high + (u64)a1 * key.step_low;
  high += (u64)v.w1 * key.high[0] + (u64)v.w2 * key.high[1] + (u64)v.w3 * key.high[2];
  u64 middle = high + ((u64)l2 << 32 | l1);  // low's upper words belong to the same places
  u32 m0 = (u32)middle, m1 = (u32)(middle >> 32);
  return ((u64)(m0 & 0x1fffffff) << 32 | l0) + (u64)m1 * 8 + (m0 >> 29);
}

template <int kUnit>
__device__ __forceinline__ Vector load(const unsigned char* p) {
  Vector v;
#if defined(__CUDA_ARCH__)
  if (kUnit == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w0), "=r"(v.w1), "=r"(v.w2), "=r"(v.w3)
        : "l"(p));
    return v;
  }
#endif
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned char* q = p + 4 * i;
    if (kUnit >= 4) {
      w[i] = *(const u32*)q;
    } else if (kUnit == 2) {
      w[i] = *(const unsigned short*)q | (u32) * (const unsigned short*)(q + 2) << 16;
    } else {
      w[i] = q[0] | (u32)q[1] << 8 | (u32)q[2] << 16 | (u32)q[3] << 24;
    }
  }
  v.w0 = w[0], v.w1 = w[1], v.w2 = w[2], v.w3 = w[3];
  return v;
}

// The vector that 8 floats give. p: half their address.
template <int kUnit, int kCast>
__device__ __forceinline__ Vector load_floats(const unsigned char* p) {
  const float* q = (const float*)((u64)p * 2);
  float f[8];
#if defined(__CUDA_ARCH__)
  if (kUnit >= 8) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
          : "=f"(f[i]), "=f"(f[i + 1]), "=f"(f[i + 2]), "=f"(f[i + 3])
          : "l"(q + i));
    }
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = q[i];
  }
  Vector v;
  v.w0 = narrowed<kCast>(f[0], f[1]), v.w1 = narrowed<kCast>(f[2], f[3]);
  v.w2 = narrowed<kCast>(f[4], f[5]), v.w3 = narrowed<kCast>(f[6], f[7]);
  return v;
}

// Bytes [low, high) of the vector; the others are not read and count as zeros.
template <int kCast>
__device__ __forceinline__ Vector load_some(const unsigned char* p, int low, int high) {
  u32 w[4] = {0, 0, 0, 0};
  if (kCast == kNoCast) {
#pragma unroll
    for (int b = 0; b < 16; ++b) {
      if (b >= low && b < high) w[b / 4] |= (u32)p[b] << (b % 4 * 8);
    }
  } else {
    const float* q = (const float*)((u64)p * 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (2 * i >= low && 2 * i < high) w[i / 2] |= (narrowed<kCast>(q[i], 0.0f) & 0xffff) << (i % 2 * 16);
    }
  }
  Vector v;
  v.w0 = w[0], v.w1 = w[1], v.w2 = w[2], v.w3 = w[3];
  return v;
}

template <int kUnit, int kCast>
__device__ __forceinline__ Vector load_as(const unsigned char* p) {
  if constexpr (kCast == kNoCast) {
    return load<kUnit>(p);
  } else {
    return load_floats<kUnit, kCast>(p);
  }
}

#ifndef GRID61_BLOCKS
#define GRID61_BLOCKS 4
#endif
#ifndef GRID61_IN_FLIGHT
#define GRID61_IN_FLIGHT 4
#endif

// A thread's column at its last row, and the way to the row before it. Nothing is written without kStore.
template <bool kStore> struct Copied {
  __device__ __forceinline__ void take(const Vector&) {}
};
template <> struct Copied<true> {
  unsigned char* at;
  i64 back;
  __device__ __forceinline__ void take(const Vector& v) {
    *(Vector*)at = v;
    at -= back;
  }
};

// Sums of one thread's column of vectors, from its last row back to its first.
template <int kUnit, int kCast, bool kStore>
__device__ __forceinline__ void walk(const unsigned char* p, i64 back, i64 rows, Copied<kStore> to, const Key& key0,
                                     const Key& key1, u64& sum0, u64& sum1) {
  constexpr int kFlight = kCast == kNoCast ? GRID61_IN_FLIGHT : (GRID61_IN_FLIGHT + 1) / 2;  // of as many bytes
  for (; rows >= kFlight; rows -= kFlight) {
    Vector v[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) v[i] = load_as<kUnit, kCast>(p - i * back);
    p -= kFlight * back;
#pragma unroll
    for (int i = 0; i < kFlight; ++i) to.take(v[i]);
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      sum0 = horner(sum0, v[i], key0);
      sum1 = horner(sum1, v[i], key1);
    }
  }
  for (; rows > 0; --rows, p -= back) {
    Vector v = load_as<kUnit, kCast>(p);
    to.take(v);
    sum0 = horner(sum0, v, key0);
    sum1 = horner(sum1, v, key1);
  }
}

// The same of whatever a segment has. partial: only bytes [low, high) of each vector are its.
template <int kCast, bool kStore>
__device__ __forceinline__ void walk_segment(i64 unit, bool partial, int low, int high, const unsigned char* p,
                                             i64 back, i64 rows, Copied<kStore> to, const Key& key0, const Key& key1,
                                             u64& sum0, u64& sum1) {
  if constexpr (kStore) {
    walk<16, kCast>(p, back, rows, to, key0, key1, sum0, sum1);
  } else if (partial) {
    for (; rows > 0; --rows, p -= back) {
      Vector v = load_some<kCast>(p, low, high);
      sum0 = horner(sum0, v, key0);
      sum1 = horner(sum1, v, key1);
    }
  } else if (unit >= (kCast == kNoCast ? 16 : 8)) {
    walk<16, kCast>(p, back, rows, to, key0, key1, sum0, sum1);
  } else if (kCast != kNoCast) {
    walk<2, kCast>(p, back, rows, to, key0, key1, sum0, sum1);
  } else if (unit >= 4) {
    walk<4, kNoCast>(p, back, rows, to, key0, key1, sum0, sum1);
  } else if (unit == 2) {
    walk<2, kNoCast>(p, back, rows, to, key0, key1, sum0, sum1);
  } else {
    walk<1, kNoCast>(p, back, rows, to, key0, key1, sum0, sum1);
  }
}

// As tile_at has the address.
__device__ __forceinline__ unsigned char* store_at(const Segment& segment, const Store& store, u32 index) {
  u64 address = store.address;
  for (int s = 0; s < segment.slots_used; ++s) {
    u32 count = (u32)segment.slots[s].count;
    address += (u64)(index % count) * (u64)store.strides[s];
    index /= count;
  }
  return (unsigned char*)address;
}

__device__ __forceinline__ u64 reduce(u64 sum) {  // to [0, P)
  return add((sum & P), sum >> 61);
}

__device__ __forceinline__ u64 warp_sum(u64 sum) {
#if WARP_SHUFFLES
  for (int d = 16; d; d >>= 1) sum = add(sum, __shfl_xor_sync(~0u, sum, d));
#endif
  return sum;
}

// Adds to a part's sum in two halves, so that 2**32 tiles can't overflow and no order is needed.
__device__ __forceinline__ void add_to(u64* pair, u64 sum) {
  atomicAdd(pair, (u64)(u32)sum);
  atomicAdd(pair + 1, sum >> 32);
}

}  // namespace

// Whatever follows from the seed: power tables and each segment's step; and zeroed sums.
// keys: [lane][axis]. table: [lane][axis][place][digit]. steps: [segment][lane]. halves: [part][lane][half].
extern "C" __global__ void grid61_prepare(const u64* keys, i64 axes, const Segment* segments, i64 segment_count,
                                          i64 half_count, u64* table, u64* steps, u64* halves) {
  i64 stride = (i64)gridDim.x * blockDim.x;
  i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  for (i64 i = thread; i < kLanes * axes * kTablePerAxis; i += stride) table[i] = table_entry(keys, i);
  for (i64 i = thread; i < kLanes * segment_count; i += stride) {
    const Segment& segment = segments[i / kLanes];
    u64 key = keys[i % kLanes * axes + segment.row_axis];
    steps[i] = raise(key, (u64)(segment.row_exponent * segment.abreast));
  }
  for (i64 i = thread; i < half_count; i += stride) halves[i] = 0;
}

namespace {

// One warp's tile. stores: of each segment, with kStore.
template <bool kStore>
__device__ __forceinline__ void digest_tile(const Segment* segments, const Store* stores, const u32* segment_of_tile,
                                            i64 tiles, const u64* table, i64 axes, const u64* steps, u64* halves) {
  i64 tile_number = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (tile_number >= tiles) return;  // the whole warp
  int thread = threadIdx.x % 32;
  u32 s = segment_of_tile[tile_number];
  const Segment& segment = segments[s];
  u32 index = (u32)(tile_number - segment.first_tile);
  Tile tile = tile_at(segment, index);

  // Threads lie over `abreast` rows of `width` vectors; each then walks down its column.
  int width = (int)((tile.end + 15) / 16), abreast = (int)segment.abreast;
  int column = thread % width, row = thread / width;
  i64 rows = row < abreast ? (tile.rows - row + abreast - 1) / abreast : 0;
  int low = (int)tile.lead - 16 * column, high = (int)tile.end - 16 * column;
  i64 back = segment.row_stride * abreast;
  const unsigned char* last = tile.address + 16 * column + row * segment.row_stride + (rows - 1) * back;

  Copied<kStore> to;
  if constexpr (kStore) {
    const Store& store = stores[s];
    to.back = store.row_stride * abreast;
    to.at = store_at(segment, store, index) + 16 * column + row * store.row_stride + (rows - 1) * to.back;
  }

  const u64* table1 = table + axes * kTablePerAxis;
  Key key0 = make_key(table, steps[kLanes * s]), key1 = make_key(table1, steps[kLanes * s + 1]);
  u64 sum0 = 0, sum1 = 0;
  bool partial = low > 0 || high < 16;
  if (segment.cast == kNoCast) {
    walk_segment<kNoCast>(segment.unit, partial, low, high, last, back, rows, to, key0, key1, sum0, sum1);
  } else if (segment.cast == kToBfloat16) {
    walk_segment<kToBfloat16>(segment.unit, partial, low, high, last, back, rows, to, key0, key1, sum0, sum1);
  } else {
    walk_segment<kToHalf>(segment.unit, partial, low, high, last, back, rows, to, key0, key1, sum0, sum1);
  }

  // The thread's own place in the tile, then the tile's in the tensor.
  sum0 = multiply(reduce(sum0), power(table, axes, 0, 0, (u64)(4 * column)));
  sum1 = multiply(reduce(sum1), power(table, axes, 1, 0, (u64)(4 * column)));
  if (row > 0) {
    sum0 = multiply(sum0, power(table, axes, 0, segment.row_axis, (u64)(row * segment.row_exponent)));
    sum1 = multiply(sum1, power(table, axes, 1, segment.row_axis, (u64)(row * segment.row_exponent)));
  }
  sum0 = warp_sum(sum0);
  sum1 = warp_sum(sum1);
  u64* out = halves + 4 * segment.part;
#if WARP_SHUFFLES
  // Half a warp for each lane, one thread for each slot.
  u64 factor = 1;
  int lane = thread / kSlots, own = thread % kSlots;
  u32 rest = index;
  for (int i = 0; i < segment.slots_used; ++i) {
    u32 count = (u32)segment.slots[i].count;
    if (i == own) factor = power(table, axes, lane, segment.slots[i].axis, slot_exponent(segment.slots[i], rest % count));
    rest /= count;
  }
  for (int d = kSlots / 2; d; d >>= 1) factor = multiply(factor, __shfl_xor_sync(~0u, factor, d));
  if (thread == 0) add_to(out, multiply(sum0, factor));
  if (thread == kSlots) add_to(out + 2, multiply(sum1, factor));
#else
  add_to(out, multiply(sum0, tile_factor(segment, index, table, axes, 0)));
  add_to(out + 2, multiply(sum1, tile_factor(segment, index, table, axes, 1)));
#endif
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, GRID61_BLOCKS)
    grid61_sums(const Segment* segments, const u32* segment_of_tile, i64 tiles, const u64* table, i64 axes,
                const u64* steps, u64* halves) {
  digest_tile<false>(segments, nullptr, segment_of_tile, tiles, table, axes, steps, halves);
}

// The same, and all that is digested is written to another place, cast if its segment is: one read of the source.
// Where it is read and what it weighs is the segment's; its store says only where it goes.
extern "C" __global__ void __launch_bounds__(256, GRID61_BLOCKS)
    grid61_copies(const Segment* segments, const Store* stores, const u32* segment_of_tile, i64 tiles,
                  const u64* table, i64 axes, const u64* steps, u64* halves) {
  digest_tile<true>(segments, stores, segment_of_tile, tiles, table, axes, steps, halves);
}

// halves: [part][lane][half], each half below 2**64. sums: [part][lane] in [0, P); may lie in the host's memory.
extern "C" __global__ void grid61_finish(const u64* halves, i64 count, u64* sums) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  u64 low = halves[2 * i], high = halves[2 * i + 1];
  // high * 2**32 with 2**61 = 1 mod P
  u64 carried = ((high & ((1u << 29) - 1)) << 32) + (high >> 29);
  sums[i] = add(reduce(carried), reduce(low));
}

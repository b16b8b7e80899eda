// grid61: arithmetic and indexing that the CPU extension and the CUDA kernel share (docs/digest.md).
//
// Work is a list of segments. A segment is a regular set of runs of contiguous bytes of one part:
// `rows` runs, `row_stride` bytes apart, repeated along up to kSlots further dimensions. It is cut into
// tiles (a strip of the run times a chunk of the rows), which are numbered through all segments.
//
// NVRTC compiles this file without any include path, so it includes nothing.
#ifndef GRID61_H
#define GRID61_H

#if defined(__CUDACC__)
#define GRID61_FN __device__ __forceinline__
#else
#define GRID61_FN inline
#endif

namespace grid61 {

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u64 P = (1ull << 61) - 1;
constexpr int kLanes = 2;
constexpr int kSlots = 16;
constexpr int kDigitBits = 6;  // Power tables hold key**(d << (kDigitBits * j)) for each digit d.
constexpr int kDigits = 7;     // Exponents reach 2**42: rows of 2**44 bytes.
constexpr int kTablePerAxis = kDigits << kDigitBits;

// One dimension over which tiles repeat: index i adds i * stride to the address and multiplies the sum by
// key[axis]**(start + i * exponent). Slot 0 runs over the strips of a run, slot 1 over the chunks of rows.
struct Slot {
  i64 count, stride, axis, exponent, start;
};

// Written by segments_of in weightbus/digest/segments.py: 8-byte fields only, so that there is no padding.
struct Segment {
  u64 address;       // of the word that holds the first byte of the first run
  i64 first_tile;    // tiles of earlier segments
  i64 part;          // which sums this segment adds to
  i64 lead;          // bytes of the first word that lie before the run: the row's phase
  i64 end;           // lead + bytes of the run
  i64 strip_bytes;   // bytes of the run that one tile takes, a multiple of 16
  i64 rows;          // runs along the walk
  i64 chunk_rows;    // of which one tile takes this many
  i64 row_stride;    // bytes between them
  i64 row_axis;      // a step along the walk multiplies by key[row_axis]**row_exponent
  i64 row_exponent;
  i64 abreast;       // rows that one warp reads at once
  i64 unit;          // greatest power of two, 16 at most, that divides every address of a word
  i64 cast;          // kNoCast; else 32-bit floats, digested as what they are cast to (csrc/narrow.h), and addresses
                     // and strides are half of what they are: as if the 16 bits lay there
  i64 slots_used;
  Slot slots[kSlots];
};

// Where one tile lies: rows [0, rows) of bytes [lead, end) after `address`.
struct Tile {
  const unsigned char* address;
  i64 lead, end, rows;
};

GRID61_FN u64 add(u64 a, u64 b) {  // a, b <= P
  u64 sum = a + b;
  return sum >= P ? sum - P : sum;
}

// a * b mod P, in [0, P), for a, b < 2**61.
GRID61_FN u64 multiply(u64 a, u64 b) {
#if defined(__CUDA_ARCH__)
  u64 low = a * b, high = __umul64hi(a, b);
#elif defined(__SIZEOF_INT128__)
  unsigned __int128 product = (unsigned __int128)a * b;
  u64 low = (u64)product, high = (u64)(product >> 64);
#else
  u64 a0 = (u32)a, a1 = a >> 32, b0 = (u32)b, b1 = b >> 32;
  u64 middle = a1 * b0 + (a0 * b0 >> 32), cross = a0 * b1 + (u32)middle;
  u64 low = a * b, high = a1 * b1 + (middle >> 32) + (cross >> 32);
#endif
  return add(low & P, low >> 61 | high << 3);
}

GRID61_FN u64 raise(u64 base, u64 exponent) {
  u64 result = 1;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) result = multiply(result, base);
    base = multiply(base, base);
  }
  return result;
}

// Entry `index` of the power table of both lanes' keys, laid out [lane][axis][digit place][digit].
GRID61_FN u64 table_entry(const u64* keys, i64 index) {
  u64 digit = index & ((1 << kDigitBits) - 1);
  int place = (int)(index % kTablePerAxis) >> kDigitBits;
  return raise(keys[index / kTablePerAxis], digit << (place * kDigitBits));
}

// key[axis]**exponent of one lane, by the table.
GRID61_FN u64 power(const u64* table, i64 axes, int lane, i64 axis, u64 exponent) {
  const u64* place = table + (lane * axes + axis) * kTablePerAxis;
  u64 result = 1;
  for (; exponent; exponent >>= kDigitBits, place += 1 << kDigitBits) {
    u32 digit = (u32)exponent & ((1u << kDigitBits) - 1);
    if (digit) result = multiply(result, place[digit]);
  }
  return result;
}

GRID61_FN u64 slot_exponent(const Slot& slot, u32 i) { return (u64)(slot.start + i * slot.exponent); }

GRID61_FN Tile tile_at(const Segment& segment, u32 index) {
  u64 address = segment.address;
  u32 places[2] = {0, 0};
  u32 rest = index;
  for (int s = 0; s < segment.slots_used; ++s) {
    u32 count = (u32)segment.slots[s].count, i = rest % count;
    rest /= count;
    address += (u64)i * (u64)segment.slots[s].stride;
    if (s < 2) places[s] = i;
  }
  i64 end = segment.end - places[0] * segment.strip_bytes;
  i64 rows = segment.rows - places[1] * segment.chunk_rows;
  Tile tile;
  tile.address = (const unsigned char*)address;
  tile.lead = places[0] ? 0 : segment.lead;
  tile.end = end < segment.strip_bytes ? end : segment.strip_bytes;
  tile.rows = rows < segment.chunk_rows ? rows : segment.chunk_rows;
  return tile;
}

// The factor that puts a tile's sum at its place in the global tensor.
GRID61_FN u64 tile_factor(const Segment& segment, u32 index, const u64* table, i64 axes, int lane) {
  u64 factor = 1;
  for (int s = 0; s < segment.slots_used; ++s) {
    const Slot& slot = segment.slots[s];
    u32 i = index % (u32)slot.count;
    index /= (u32)slot.count;
    factor = multiply(factor, power(table, axes, lane, slot.axis, slot_exponent(slot, i)));
  }
  return factor;
}

}  // namespace grid61

#endif  // GRID61_H

// Casts to 16 bits that csrc/copy.cu and csrc/grid61.cu share. NVRTC has no include path: this includes nothing.
#ifndef NARROW_H
#define NARROW_H

constexpr int kNoCast = 0, kToBfloat16 = 1, kToHalf = 2;  // CASTS in weightbus/memory/copy_descriptors.py

#if defined(__CUDA_ARCH__)
// Two floats as 16 bits each, to the nearest, ties to even; the first in the lower half. By the instruction of
// torch's own casts, so that both give the same bits.
template <int kCast> __device__ __forceinline__ unsigned narrowed(float first, float second) {
  unsigned both;
  if constexpr (kCast == kToBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
}
#else
// For tests that compile kernels for the host.
template <int kCast> inline unsigned narrowed(float value) {
  if (kCast == kToHalf) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
  }
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <int kCast> inline unsigned narrowed(float first, float second) {
  return narrowed<kCast>(first) | narrowed<kCast>(second) << 16;
}
#endif

#endif  // NARROW_H

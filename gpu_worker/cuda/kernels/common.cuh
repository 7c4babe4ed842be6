// What the kernels share. Compiled by NVRTC: no system header is needed.
#pragma once
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Programmatic dependent launch: a kernel may start while its predecessor still runs. wait() returns once all earlier
// kernels are complete and their writes visible; trigger() lets the next kernel start. Every block calls both. Before Hopper they are
// nothing, and no kernel is launched that way.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
__device__ __forceinline__ void pdl_wait() {}
__device__ __forceinline__ void pdl_trigger() {}
#endif

// bf16 pairs: the low half is the element at the lower address
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pair(float first, float second) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}

// Sum of the squares of eight bf16.
__device__ __forceinline__ float squares(uint4 v) {
  const u32 e[4] = {v.x, v.y, v.z, v.w};
  float q = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) q = fmaf(low(e[i]), low(e[i]), fmaf(high(e[i]), high(e[i]), q));
  return q;
}

// One element of the model's type: DTYPE 0 bf16, 1 fp16, 2 fp32
#ifndef DTYPE
#define DTYPE 0
#endif
#if DTYPE == 2
typedef float elem;
__device__ __forceinline__ float value(elem e) { return e; }
__device__ __forceinline__ elem rounded(float f) { return f; }
#elif DTYPE == 1
typedef u16 elem;
__device__ __forceinline__ float value(elem e) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(e)); return f; }
__device__ __forceinline__ elem rounded(float f) { u16 e; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(e) : "f"(f)); return e; }
#else
typedef u16 elem;
__device__ __forceinline__ float value(elem e) { return __uint_as_float((u32)e << 16); }
__device__ __forceinline__ elem rounded(float f) { u16 e; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(e) : "f"(f)); return e; }
#endif

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Sum over a block of at most 1,024 threads; `scratch` holds 32 floats. Ends with a barrier: scratch may be reused.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.f;
  for (int i = 0; i < (blockDim.x + 31) / 32; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

// `linear` of kernels/linear.cu on a CPU. A cluster is one block here, whose barrier is that of all its blocks; one cluster runs after
// another. What the kernel does by single instructions (kernels/fragments.cuh) is done by hand.
#include "host_block.h"

#include <cmath>
#include <cstring>

struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __shfl_xor_sync(unsigned, float value, int by) {
  const int lane = block::current & 31;
  return __uint_as_float(block::exchange(int(__float_as_uint(value)))[lane ^ by]);
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
static void __syncwarp() { block::exchange(0); }
template <class T> static T __ldcg(const T* p) { return *p; }
#define __expf expf
static float rsqrtf(float x) { return 1.f / sqrtf(x); }

#define pair without_ptx
#include "common.cuh"
#undef pair
static u32 bf16(float f) {  // to the nearest, ties to even; NaN stays one
  const u32 bits = __float_as_uint(f);
  return f != f ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
static u32 pair(float first, float second) { return bf16(first) | bf16(second) << 16; }

#define FRAGMENTS
#define STRIDE_OF_BLOCKS (1 << 16)  // floats of shared memory
static float memory[8 * STRIDE_OF_BLOCKS];
static float* shared_memory() { return memory + block::current / (32 * W) * STRIDE_OF_BLOCKS; }
static void load_weights(u32 (&r)[4], const void* p) { memcpy(r, p, 16); }
static void load_scale(float& r, const float* p) { r = *p; }
static void prefetch(const void*) {}
static u32 product(u32 a, u32 b) { return pair(low(a) * low(b), high(a) * high(b)); }
static void cluster_barrier() { __syncthreads(); }
static float2 peer_read(const float2* here, int rank) {
  return *(const float2*)((const float*)here + (rank - block::current / (32 * W)) * STRIDE_OF_BLOCKS);
}
static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  std::vector<int> all[6];
  for (int i = 0; i < 6; ++i) all[i] = block::exchange(int(mine[i]));
  const int lane = block::current & 31, g = lane >> 2, t = lane & 3;
  for (int q = 0; q < 4; ++q)
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, row = g * 4 + from, token = (2 * t + q % 2) * 4 + from;
      const u32 a = u32(all[q / 2 + k / 8 * 2][row]), b = u32(all[4 + k / 8][token]);
      c[q] += (k % 2 ? high(a) : low(a)) * (k % 2 ? high(b) : low(b));
    }
}

#undef __shared__
#include "linear_on_host.cu"  // linear.cu, but for where shared memory is

extern "C" bool host_linear(unsigned seed, const weight* weights, const u16* x, const u16* res, const u16* bias, u16* y, int M, float eps,
                            const float* scales, const u16* norm) {
  for (int cluster = 0; cluster < CLUSTERS; ++cluster) {
    for (float& f : memory) f = NAN;
    if (!block::run(KS * THREADS, seed + cluster, [=] {
          blockIdx.x = cluster * KS + threadIdx.x / THREADS;
          threadIdx.x %= THREADS;
          linear(weights, x, res, bias, y, M, eps
#ifdef FP8
                 , scales, norm
#endif
          );
        }))
      return false;
  }
  return true;
}

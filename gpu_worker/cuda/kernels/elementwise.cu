// What stands between the large linears: embedding, RMSNorm, rotary embedding with the write of K and V, SiLU. fp32 inside.
// Macros: DTYPE, the model's type (common.cuh); DIM, the head dimension; KV8, where the cache of keys and values is fp8 (e4m3).
#include "common.cuh"

#define VECTOR (16 / (int)sizeof(elem))  // elements in 16 bytes
union Vector {
  uint4 bits;
  elem at[VECTOR];
};

// h[row, :] = table[tokens[row], :]; grid (rows)
extern "C" __global__ void embed(const int* tokens, const elem* table, elem* h, int hidden) {
  pdl_wait();
  pdl_trigger();
  const uint4* from = (const uint4*)(table + (u64)tokens[blockIdx.x] * hidden);
  uint4* to = (uint4*)(h + (u64)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / VECTOR; i += blockDim.x) to[i] = from[i];
}

// y[row, :] = h[index ? index[row] : row, :] / rms * weight (1 where weight is null); grid (rows); hidden <= 8 * VECTOR * threads
extern "C" __global__ void rms_norm(const elem* h, const int* index, const elem* weight, elem* y, int hidden, float eps) {
  __shared__ float scratch[32];
  pdl_wait();
  pdl_trigger();
  const int source = index ? index[blockIdx.x] : blockIdx.x, vectors = hidden / VECTOR;
  const uint4* x = (const uint4*)(h + (u64)source * hidden);
  Vector v[8];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) {
      v[i].bits = x[at];
#pragma unroll
      for (int q = 0; q < VECTOR; ++q) sum = fmaf(value(v[i].at[q]), value(v[i].at[q]), sum);
    }
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / hidden + eps);
  uint4* out = (uint4*)(y + (u64)blockIdx.x * hidden);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    if (at < vectors) {
      Vector w;
      if (weight) w.bits = ((const uint4*)weight)[at];
#pragma unroll
      for (int q = 0; q < VECTOR; ++q) v[i].at[q] = rounded(value(v[i].at[q]) * scale * (weight ? value(w.at[q]) : 1.f));
      out[at] = v[i].bits;
    }
  }
}

// qkv[token, (heads + 2 kv_heads) * DIM]: q and k are normalised over DIM (if the weights are given) and rotated, q in place;
// k and v go to cache[block][K, V][kv_head][offset][DIM] of one layer at places[token]. Grid (tokens, ceil((heads + 2 kv_heads) * SPAN /
// 256)), 256 threads: SPAN neighbours a head, of which LANES have 16 bytes each. cosines, sines: [positions, DIM / 2] fp32.
// KV8: kv_scales holds the units of keys and of values, fp32 [2]; what does not fit becomes 448, NaN stays NaN.
#define LANES (DIM / VECTOR)
#define SPAN (LANES <= 4 ? 4 : LANES <= 8 ? 8 : LANES <= 16 ? 16 : 32)
#define CACHE_AT ((((u64)(place / block_size) * 2 + is_v) * kv_heads + (head - heads) % kv_heads) * block_size + place % block_size) * DIM + lane * VECTOR
extern "C" __global__ void rotate_and_store(elem* qkv, const int* positions, const int* places, const elem* q_norm, const elem* k_norm,
                                            const float* cosines, const float* sines, elem* cache, int heads, int kv_heads,
                                            int block_size, float eps
#ifdef KV8
                                            , const float* kv_scales
#endif
                                            ) {
  static_assert(LANES <= 32 && DIM % VECTOR == 0 && LANES % 2 == 0, "a head must fit a warp");
  pdl_wait();
  pdl_trigger();
  const int token = blockIdx.x, head = (blockIdx.y * 256 + threadIdx.x) / SPAN;
  const bool idle = SPAN > LANES && threadIdx.x % SPAN >= LANES;
  const int lane = idle ? 0 : threadIdx.x % SPAN;
  const bool there = head < heads + 2 * kv_heads && !idle, is_q = head < heads, is_v = head >= heads + kv_heads;
  elem* x = qkv + ((u64)token * (heads + 2 * kv_heads) + (there ? head : 0)) * DIM + lane * VECTOR;
  const int place = places[token];
  Vector v;
  v.bits = *(const uint4*)x;
  float a[VECTOR];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    a[i] = value(v.at[i]);
    sum = fmaf(a[i], a[i], sum);
  }
  const elem* weight = is_q ? q_norm : k_norm;
  if (weight) {  // the same for all threads
    if (idle) sum = 0.f;
#pragma unroll
    for (int d = SPAN / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (!is_v) {
      const float scale = rsqrtf(sum / DIM + eps);
      Vector w;
      w.bits = ((const uint4*)weight)[lane];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) a[i] *= scale * value(w.at[i]);
    }
  }
  const u64 angle = (u64)positions[token] * (DIM / 2) + lane % (LANES / 2) * VECTOR;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const int other = (threadIdx.x & 31 & ~(SPAN - 1)) + (lane < LANES / 2 ? lane + LANES / 2 : lane - LANES / 2);
    const float b = SPAN == LANES ? __shfl_xor_sync(0xffffffffu, a[i], LANES / 2) : __shfl_sync(0xffffffffu, a[i], other);
    if (!is_v) v.at[i] = rounded(a[i] * cosines[angle + i] + (lane < LANES / 2 ? -b : b) * sines[angle + i]);
  }
  if (!there) return;
  elem* to = x;
#ifdef KV8
  if (!is_q) {
    const float unit = kv_scales[is_v];
    union { uint2 eight; u32 four; u16 two[VECTOR / 2]; } bytes;
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i)
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes.two[i]) : "f"(value(v.at[2 * i + 1]) / unit), "f"(value(v.at[2 * i]) / unit));
    unsigned char* byte = (unsigned char*)cache + CACHE_AT;
    if (VECTOR == 8) *(uint2*)byte = bytes.eight;
    else *(u32*)byte = bytes.four;
    return;
  }
#else
  if (!is_q) to = cache + CACHE_AT;
#endif
  *(uint4*)to = v.bits;
}

// y[i] = silu(x[2 i]) x[2 i + 1] for `count` outputs (gate and up interleaved); grid (ceil(count / (threads * VECTOR / 2)))
extern "C" __global__ void silu_mul(const elem* x, elem* y, long long count) {
  pdl_wait();
  pdl_trigger();
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at * (VECTOR / 2) >= count) return;
  Vector v;
  v.bits = ((const uint4*)x)[at];
  union { uint2 bits; elem e[VECTOR / 2]; } out;
#pragma unroll
  for (int i = 0; i < VECTOR / 2; ++i) {
    const float gate = value(v.at[2 * i]);
    out.e[i] = rounded(gate / (1.f + __expf(-gate)) * value(v.at[2 * i + 1]));
  }
  ((uint2*)y)[at] = out.bits;
}

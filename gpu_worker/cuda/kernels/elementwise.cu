// What stands between the large linears: embedding, RMSNorm, rotary embedding with the write of K and V, SiLU. fp32 inside.
// Macro DTYPE: the model's type (common.cuh).
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

// qkv[token, (heads + 2 kv_heads) * dim]: q and k are normalised over dim (if the weights are given) and rotated, q in place;
// k and v go to cache[block][K, V][kv_head][offset][dim] of one layer at places[token]. Grid (tokens, ceil((heads + 2 kv_heads) / 8)),
// 256 threads: one warp a head. cos, sin: [positions, dim / 2] fp32.
extern "C" __global__ void rotate_and_store(elem* qkv, const int* positions, const int* places, const elem* q_norm, const elem* k_norm,
                                            const float* cosines, const float* sines, elem* cache, int heads, int kv_heads, int dim,
                                            int block_size, float eps) {
  pdl_wait();
  pdl_trigger();
  const int token = blockIdx.x, head = blockIdx.y * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (head >= heads + 2 * kv_heads) return;
  elem* x = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * dim;
  const int place = places[token], block = place / block_size, offset = place % block_size;
  const int kv = head < heads ? 0 : (head - heads) % kv_heads, is_v = head >= heads + kv_heads;
  elem* to = head < heads ? x : cache + ((((u64)block * 2 + is_v) * kv_heads + kv) * block_size + offset) * dim;
  const int half = dim / 2;
  if (is_v) {
    for (int d = lane; d < dim; d += 32) to[d] = x[d];
    return;
  }
  const elem* weight = head < heads ? q_norm : k_norm;
  float scale = 1.f;
  if (weight) {
    float sum = 0.f;
    for (int d = lane; d < dim; d += 32) sum = fmaf(value(x[d]), value(x[d]), sum);
    scale = rsqrtf(warp_sum(sum) / dim + eps);
  }
  const float* c = cosines + (u64)positions[token] * half;
  const float* s = sines + (u64)positions[token] * half;
  for (int d = lane; d < half; d += 32) {
    const float a = value(x[d]) * scale * (weight ? value(weight[d]) : 1.f);
    const float b = value(x[d + half]) * scale * (weight ? value(weight[d + half]) : 1.f);
    to[d] = rounded(a * c[d] - b * s[d]);
    to[d + half] = rounded(b * c[d] + a * s[d]);
  }
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

// One token per output: the largest logit (temperature 0), or the largest of logit / temperature + Gumbel noise (Gumbel-max trick),
// which is a draw from the softmax. The noise is a function of (seed, position, token id) alone, by Philox 4x32-10 (Salmon et al.,
// SC 2011): the same draws in any slot, batch or worker, and the same as `gpu_worker/sampler.py`'s.
//
// A slot's parameters, 32 words: 0 the slot itself, 1 temperature (float), 2 3 seed (low, high), 4 number of stop ids, 5 … 31 stop ids.
// Result entry, int32 words: 0 1 start, 2 3 end (nanoseconds), then tokens[slots], flags[slots].
// Macro DTYPE: type of the logits (common.cuh).
#include "common.cuh"

#define STOPPED 1  // protocol.messages
#define NAN_LOGITS 2
#define DEAD 4

struct Best {
  float score;
  int token;
  int nan;
  int pad;
};

__device__ __forceinline__ Best better(Best a, Best b) {  // ties: the lower id
  const bool take = b.score > a.score || (b.score == a.score && b.token < a.token);
  Best r = take ? b : a;
  r.nan = a.nan | b.nan;
  return r;
}

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 h0 = __umulhi(0xD2511F53u, counter.x), l0 = 0xD2511F53u * counter.x;
    const u32 h1 = __umulhi(0xCD9E8D57u, counter.z), l1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(h1 ^ counter.y ^ key.x, l1, h0 ^ counter.w ^ key.y, l0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// A random word to u in (0, 1), as `philox.py` says it.
__device__ __forceinline__ float uniform(u32 word) { return fminf((float)word * 0x1p-32f + 0x1p-33f, 1.f - 0x1p-24f); }
__device__ __forceinline__ float gumbel(float u) { return -logf(-log1pf(-u)); }

union Vector {
  uint4 bits;
  elem at[16 / sizeof(elem)];
};
#define VECTOR (16 / (int)sizeof(elem))

// grid (splits, outputs), 256 threads; partial [outputs, splits], arrivals [outputs] zero, left zero; vocab a multiple of VECTOR
extern "C" __global__ void __launch_bounds__(256)
sample(const elem* logits, const int4* outputs, const int* step, const int* parameters, int* last_token, int* dead, Best* partial,
       int* arrivals, int* results, int result_words, int slots, int vocab) {
  __shared__ Best shared[8];
  __shared__ int is_last;
  pdl_wait();
  pdl_trigger();
  const int splits = gridDim.x, tid = threadIdx.x;
  const int4 output = outputs[blockIdx.y];  // row of the logits, slot, position
  if (output.y < 0) return;
  const int* mine = parameters + output.y * 32;
  const float temperature = __int_as_float(mine[1]);
  const uint2 key = make_uint2((u32)mine[2], (u32)mine[3]);
  const int vectors = vocab / VECTOR, per = (vectors + splits - 1) / splits;
  const int from = blockIdx.x * per, to = min(from + per, vectors);
  const uint4* row = (const uint4*)(logits + (u64)output.x * vocab);

  Best best = {-__int_as_float(0x7f800000), 0x7fffffff, 0, 0};
  for (int i = from + tid; i < to; i += 256) {
    Vector v;
    v.bits = __ldcg(row + i);
    u32 noise[VECTOR];
    if (temperature > 0.f)
#pragma unroll
      for (int q = 0; q < VECTOR / 4; ++q) {
        const uint4 r = philox(make_uint4((u32)output.z, (u32)(i * (VECTOR / 4) + q), 0u, 0u), key);
        noise[4 * q] = r.x;
        noise[4 * q + 1] = r.y;
        noise[4 * q + 2] = r.z;
        noise[4 * q + 3] = r.w;
      }
#pragma unroll
    for (int q = 0; q < VECTOR; ++q) {
      float s = value(v.at[q]);
      if (s != s) best.nan = 1;
      if (temperature > 0.f) {
        s /= temperature;
        const float u = uniform(noise[q]);
        if (s - __logf(u) + 0.01f < best.score) continue;  // its noise is at most -log(u): cannot win, and saves two logarithms
        s += gumbel(u);
      }
      if (s > best.score) {  // ids rise within a thread: the first of equals stays
        best.score = s;
        best.token = i * VECTOR + q;
      }
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    Best other;
    other.score = __shfl_xor_sync(0xffffffffu, best.score, d);
    other.token = __shfl_xor_sync(0xffffffffu, best.token, d);
    other.nan = __shfl_xor_sync(0xffffffffu, best.nan, d);
    best = better(best, other);
  }
  if ((tid & 31) == 0) shared[tid >> 5] = best;
  __syncthreads();
  if (tid == 0) {
    for (int i = 1; i < 8; ++i) best = better(best, shared[i]);
    partial[blockIdx.y * splits + blockIdx.x] = best;
    __threadfence();
    is_last = atomicAdd(arrivals + blockIdx.y, 1) == splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || tid >= 32) return;
  best = {-__int_as_float(0x7f800000), 0x7fffffff, 0, 0};
  for (int i = tid; i < splits; i += 32) {
    const int4 p = __ldcg((const int4*)(partial + blockIdx.y * splits + i));
    const Best b = {__int_as_float(p.x), p.y, p.z, 0};
    best = better(best, b);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    Best other;
    other.score = __shfl_xor_sync(0xffffffffu, best.score, d);
    other.token = __shfl_xor_sync(0xffffffffu, best.token, d);
    other.nan = __shfl_xor_sync(0xffffffffu, best.nan, d);
    best = better(best, other);
  }
  int stops = 0;
  const int count = mine[4];
  if (tid < count && mine[5 + tid] == best.token) stops = 1;
  stops = __any_sync(0xffffffffu, stops);
  if (tid) return;
  arrivals[blockIdx.y] = 0;
  int flags = 0, token = best.token;
  if (dead[output.y]) flags = DEAD;
  else if (best.nan || token == 0x7fffffff) flags = NAN_LOGITS;
  else if (stops) flags = STOPPED;
  if (flags & (DEAD | NAN_LOGITS)) token = -1;
  else last_token[output.y] = token;
  if (flags & (STOPPED | NAN_LOGITS)) dead[output.y] = 1;
  int* result = results + (u64)step[2] * result_words;
  result[4 + blockIdx.y] = token;
  result[4 + slots + blockIdx.y] = flags;
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  ((u64*)result)[1] = now;  // the last output's stands
}

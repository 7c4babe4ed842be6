// Attention of one new token per sequence for few sequences, where latency counts and not bandwidth: the same task as
// `decode_attention.py` (norm, rotation, cache write, attention), cut the other way. A cluster of CL blocks serves one (row, KV head);
// its warps take the cached tokens in turn. No shared memory and no barrier stands before the end: a warp's lanes hold the queries of
// the KV head, LPT lanes read a token's key and value, 16 bytes each, and the first of them are in flight before the kernel waits for
// its predecessor. At the end every warp sends its part of the softmax to the blocks that finish it (distributed shared memory).
//
// Macros: KV_HEADS, R (query heads per KV head), DIM, PAGE, WIDTH (of the block table), CL, QK_NORM. bf16.
#include "common.cuh"

#define NW 8                       // warps of a block
#define LPT (DIM / 8)              // lanes per token
#define TPW (32 / LPT)             // tokens a warp reads at once
#define U 4                        // such reads in flight
#define HEADS (KV_HEADS * R)
#define PLANE (KV_HEADS * PAGE * DIM)
#define OUT (R * DIM / CL)         // outputs that one block finishes
#define STRIDE (OUT + 4)
#define SOURCES (CL * NW)
#define FIT (32 * NW / OUT)
#define PARTS (FIT >= 8 ? 8 : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1)  // neighbouring threads that join one output
#define NOTHING -1.0e30f
static_assert(LPT <= 32 && OUT % 8 == 0 && OUT * PARTS % 32 == 0, "shape");

__device__ __forceinline__ float over_token(float v) {  // sum over the lanes of a token
#pragma unroll
  for (int d = LPT / 2; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
__device__ __forceinline__ void unpack(uint4 v, float (&f)[8]) {
  const u32 e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = low(e[i]);
    f[2 * i + 1] = high(e[i]);
  }
}
__device__ __forceinline__ uint4 read_cached(const u16* p, bool there) {  // volatile: stays before the wait
  uint4 v = make_uint4(0u, 0u, 0u, 0u);
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %5, 0; @q ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((u32)there) : "memory");
  return v;
}
__device__ __forceinline__ u32 peer_address(const void* here, int rank) {  // the same place in block `rank` of the cluster
  u32 at = (u32)__cvta_generic_to_shared(here), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}

extern "C" __global__ void __launch_bounds__(32 * NW, R > 3 ? 1 : 2)
decode_few(const u16* qkv, u16* cache, const int* table, const int4* rows, u16* out, const u16* q_norm, const u16* k_norm,
           const float* cosines, const float* sines, float scale, float eps) {
  __shared__ __align__(16) float inbox[SOURCES][STRIDE];
  __shared__ float2 inbox_ml[SOURCES][R];  // maximum, sum
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // peers must run before anyone sends
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, in_token = lane % LPT, sub = lane / LPT;
  const int rank = blockIdx.x % CL, h = blockIdx.x / CL % KV_HEADS, row = blockIdx.x / (CL * KV_HEADS);
  // What earlier steps and `prepare` wrote may be read before the wait: they, and the linear before this kernel's predecessor, are done.
  const int4 where = rows[2 * row];
  const int position = where.y;
  const int* pages = table + (u64)where.x * WIDTH;
  const int mine = rank * NW + warp;
  const u64 offset = h * (PAGE * DIM) + in_token * 8;

  const u16* at[U];  // where a token's key lies; null: there is none
  auto look_up = [&](int round) {
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int token = ((round * U + i) * SOURCES + mine) * TPW + sub;
      at[i] = token < position ? cache + (u64)pages[token / PAGE] * (2 * PLANE) + offset + token % PAGE * DIM : nullptr;
    }
  };
  uint4 k[U], v[U];
  auto read = [&](uint4 (&to)[U], int plane) {
#pragma unroll
    for (int i = 0; i < U; ++i) to[i] = read_cached(at[i] + plane, at[i] != nullptr);
  };
  look_up(0);
  read(k, 0);
  read(v, PLANE);
  float c[8], s[8];  // rotation: this lane's dimensions, the sine with the partner's sign
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int angle = position * (DIM / 2) + in_token % (LPT / 2) * 8 + i;
    c[i] = cosines[angle];
    s[i] = in_token < LPT / 2 ? -sines[angle] : sines[angle];
  }
#if QK_NORM
  const uint4 qw = ((const uint4*)q_norm)[in_token], kw = ((const uint4*)k_norm)[in_token];
#else
  const uint4 qw = make_uint4(0u, 0u, 0u, 0u), kw = qw;
#endif
  pdl_wait();
  pdl_trigger();

  const u16* x = qkv + (u64)row * ((HEADS + 2 * KV_HEADS) * DIM) + in_token * 8;
  auto turned = [&](uint4 bits, uint4 weight, float by, float (&f)[8]) {
    unpack(bits, f);
    float scaled = by;
#if QK_NORM
    float sum = 0.f, w[8];
    unpack(weight, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(f[i], f[i], sum);
    const float rms = rsqrtf(over_token(sum) / DIM + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] *= rms * w[i];
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = (f[i] * c[i] + __shfl_xor_sync(0xffffffffu, f[i], LPT / 2) * s[i]) * scaled;
  };
  uint4 qb[R];
#pragma unroll
  for (int r = 0; r < R; ++r) qb[r] = __ldcg((const uint4*)(x + (h * R + r) * DIM));
  uint4 kb = make_uint4(0u, 0u, 0u, 0u), vb = kb;
  if (mine == 0) {
    kb = __ldcg((const uint4*)(x + (HEADS + h) * DIM));
    vb = __ldcg((const uint4*)(x + (HEADS + KV_HEADS + h) * DIM));
  }
  float q[R][8];
#pragma unroll
  for (int r = 0; r < R; ++r) turned(qb[r], qw, scale, q[r]);

  float m[R], total[R], acc[R][8];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    m[r] = NOTHING;
    total[r] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[r][i] = 0.f;
  }
  if (mine == 0) {  // the new token, by the lanes of sub 0
    float f[8], value[8];
    turned(kb, kw, 1.f, f);
    const uint4 rounded = make_uint4(pair(f[0], f[1]), pair(f[2], f[3]), pair(f[4], f[5]), pair(f[6], f[7]));
    unpack(rounded, f);
    unpack(vb, value);
    if (sub == 0) {
      u16* at = cache + (u64)pages[position / PAGE] * (2 * PLANE) + offset + position % PAGE * DIM;
      *(uint4*)at = rounded;
      *(uint4*)(at + PLANE) = vb;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(q[r][i], f[i], score);
      score = over_token(score);
      if (sub == 0) {
        m[r] = score;
        total[r] = 1.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[r][i] = value[i];
      }
    }
  }

  const int rounds = (position + U * SOURCES * TPW - 1) / (U * SOURCES * TPW);
  for (int round = 0; round < rounds; ++round) {
    float score[U][R];
#pragma unroll
    for (int i = 0; i < U; ++i) {
      float f[8];
      unpack(k[i], f);
      const bool there = ((round * U + i) * SOURCES + mine) * TPW + sub < position;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(q[r][j], f[j], sum);
        sum = over_token(sum);
        score[i][r] = there ? sum : NOTHING;
      }
    }
    const bool more = round + 1 < rounds;
    if (more) {
      look_up(round + 1);
      read(k, 0);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float top = m[r];
#pragma unroll
      for (int i = 0; i < U; ++i) top = fmaxf(top, score[i][r]);
      const float shrink = exp2f(m[r] - top);
      m[r] = top;
      total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[r][j] *= shrink;
#pragma unroll
      for (int i = 0; i < U; ++i) {
        const float p = score[i][r] > NOTHING ? exp2f(score[i][r] - top) : 0.f;
        total[r] += p;
        score[i][r] = p;
      }
    }
#pragma unroll
    for (int i = 0; i < U; ++i) {
      float f[8];
      unpack(v[i], f);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[r][j] = fmaf(score[i][r], f[j], acc[r][j]);
    }
    if (more) read(v, PLANE);
  }

  // the tokens of a warp into one, then to the blocks that finish
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int d = LPT; d < 32; d <<= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, m[r], d), top = fmaxf(m[r], other), shrink = exp2f(m[r] - top);
      const float theirs = exp2f(other - top);
      total[r] = total[r] * shrink + __shfl_xor_sync(0xffffffffu, total[r], d) * theirs;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[r][j] = acc[r][j] * shrink + __shfl_xor_sync(0xffffffffu, acc[r][j], d) * theirs;
      m[r] = top;
    }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (sub == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int index = r * DIM + in_token * 8;
      const u32 to = peer_address(&inbox[mine][index % OUT], index / OUT);
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(acc[r][0]), "f"(acc[r][1]), "f"(acc[r][2]), "f"(acc[r][3]) : "memory");
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16), "f"(acc[r][4]), "f"(acc[r][5]), "f"(acc[r][6]), "f"(acc[r][7]) : "memory");
    }
  }
  if (lane < CL) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(peer_address(&inbox_ml[mine][r], lane)), "f"(m[r]), "f"(total[r]) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");

  const int own = tid / PARTS, part = tid % PARTS;
  if (own >= OUT) return;  // whole warps
  const int index = rank * OUT + own, r = index / DIM;
  float top = NOTHING;
#pragma unroll
  for (int i = 0; i < SOURCES; i += PARTS) top = fmaxf(top, inbox_ml[i + part][r].x);
#pragma unroll
  for (int d = PARTS / 2; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  float sum = 0.f, result = 0.f;
#pragma unroll
  for (int i = 0; i < SOURCES; i += PARTS) {
    const float2 ml = inbox_ml[i + part][r];
    const float weight = exp2f(ml.x - top);
    sum = fmaf(ml.y, weight, sum);
    result = fmaf(inbox[i + part][own], weight, result);
  }
#pragma unroll
  for (int d = PARTS / 2; d; d >>= 1) {
    sum += __shfl_xor_sync(0xffffffffu, sum, d);
    result += __shfl_xor_sync(0xffffffffu, result, d);
  }
  if (part == 0) out[(u64)row * (HEADS * DIM) + h * (R * DIM) + index] = (u16)pair(result / sum, 0.f);
}

// `prepare` of kernels/plan.cu on a CPU.
#include "host_block.h"
#include "plan.cu"

extern "C" bool host_prepare(int threads, unsigned seed, int* table, int* parameters, int* last_token, int* dead, int slots, int width,
                             int4* rows, int4* outputs, int* tokens, int* positions, int* places, int* tiles, int* logit_rows, int4* items,
                             int* step, const int* ring, int entry_words, int entries, u64* results, int result_words, int bucket,
                             int max_items, int spread, int least, int limit, int block_size, int decode, int tokens_launched, int tiles_launched,
                             int dummy_block) {
  const Slots s = {table, parameters, last_token, dead, slots, width};
  const Inputs in = {rows, outputs, tokens, positions, places, tiles, logit_rows, items, step};
  return block::run(threads, seed, [=] {
    prepare(s, in, ring, entry_words, entries, results, result_words, bucket, max_items, spread, least, limit, block_size, decode,
            tokens_launched, tiles_launched, dummy_block);
  });
}

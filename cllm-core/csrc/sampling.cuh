// How a token is chosen from logits: by the largest score.

// 32 random bits for a token at the position with the noise key `key`: the finaliser of SplitMix64
// (Steele et al. 2014).
__device__ __forceinline__ u32 hash(u64 key, u32 token) {
  u64 z = key + 0x9e3779b97f4a7c15ull * (u64)(token + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (u32)((z ^ (z >> 31)) >> 32);
}

// Gumbel noise from 23 random bits: with 24, adding one half would round the largest up to 1. It is
// at least MIN_NOISE and at most max_noise(bits) <= MAX_NOISE.
#define MIN_NOISE -2.82f
#define MAX_NOISE 16.65f
__device__ __forceinline__ float noise(u32 bits) {
  float uniform = ((float)bits + 0.5f) * (1.f / 8388608.f);
  return -logf(-logf(uniform));
}
// -log(-log(u)) <= -log(1 - u), where 1 - u is at least half the power of two that it begins with.
__device__ __forceinline__ float max_noise(u32 bits) { return 0.6931472f * (__clz(8388608u - bits) - 7) + 1e-2f; }

// The token with the largest score is sampled: the score is the logit itself for greedy decoding
// (inverse_temperature 0), or else the logit with Gumbel noise, which makes the maximum a sample of
// the softmax.
__device__ __forceinline__ float sampling_score(float logit, float inverse_temperature, u64 key, int token) {
  if (inverse_temperature == 0.f) return logit;
  return logit * inverse_temperature + noise(hash(key, (u32)token) >> 9);
}

// The id where there is no token. It loses against all others.
#define NO_TOKEN 0x7fffffff

// Ties go to the lower id. A NaN never wins.
__device__ __forceinline__ bool is_better(float score, int id, float best, int best_id) {
  return score > best || (score == best && id < best_id);
}

// Every one of `lanes` neighbouring lanes gets the best score among them.
__device__ __forceinline__ void warp_argmax(int lanes, float &best, int &best_id) {
  for (int step = lanes / 2; step > 0; step >>= 1) {
    float score = __shfl_xor_sync(0xffffffffu, best, step);
    int id = __shfl_xor_sync(0xffffffffu, best_id, step);
    if (is_better(score, id, best, best_id)) best = score, best_id = id;
  }
}

// Thread 0 gets the best score among the threads of a block.
__device__ __forceinline__ void block_argmax(float &best, int &best_id) {
  __shared__ float scores[32];
  __shared__ int ids[32];
  warp_argmax(32, best, best_id);
  if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = best, ids[threadIdx.x / 32] = best_id;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < blockDim.x / 32; w++)
      if (is_better(scores[w], ids[w], best, best_id)) best = scores[w], best_id = ids[w];
}

// The best of some tokens, in descending order, and what the softmax of all their scores needs: the
// sum of exp(score - scores[0]).
struct Candidates {
  float scores[MAX_CANDIDATES] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  int ids[MAX_CANDIDATES] = {NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN};
  float sum = 0.f;

  static __device__ __forceinline__ Candidates only(float score, int id) {
    Candidates one;
    one.scores[0] = score, one.ids[0] = id;
    one.sum = score > -INFINITY ? 1.f : 0.f;
    return one;
  }

  // Leaves the sum as it is.
  __device__ __forceinline__ void insert(float score, int id) {
    if (!is_better(score, id, scores[MAX_CANDIDATES - 1], ids[MAX_CANDIDATES - 1])) return;
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++)
      if (is_better(score, id, scores[r], ids[r])) {
        const float next = scores[r];
        const int next_id = ids[r];
        scores[r] = score, ids[r] = id;
        score = next, id = next_id;
      }
  }

  // The sum relative to another largest score.
  __device__ __forceinline__ float sum_relative_to(float max) const {
    return sum == 0.f ? 0.f : sum * __expf(scores[0] - max);
  }

  __device__ __forceinline__ void merge(const Candidates &other) {
    const float max = fmaxf(scores[0], other.scores[0]);
    sum = sum_relative_to(max) + other.sum_relative_to(max);
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) insert(other.scores[r], other.ids[r]);
  }

  __device__ __forceinline__ void remove_first() {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES - 1; r++) scores[r] = scores[r + 1], ids[r] = ids[r + 1];
    scores[MAX_CANDIDATES - 1] = -INFINITY, ids[MAX_CANDIDATES - 1] = NO_TOKEN;
  }
};

// Every one of `lanes` neighbouring lanes gets the candidates among the tokens of all of them.
__device__ __forceinline__ void warp_candidates(int lanes, Candidates &candidates) {
  Candidates rest = candidates, all;
#pragma unroll
  for (int r = 0; r < MAX_CANDIDATES; r++) {
    all.scores[r] = rest.scores[0], all.ids[r] = rest.ids[0];
    warp_argmax(lanes, all.scores[r], all.ids[r]);
    if (rest.ids[0] == all.ids[r]) rest.remove_first();
  }
  all.sum = candidates.sum_relative_to(all.scores[0]);
  for (int step = lanes / 2; step > 0; step >>= 1) all.sum += __shfl_xor_sync(0xffffffffu, all.sum, step);
  candidates = all;
}

// The first warp gets the candidates among the tokens of a block.
__device__ __forceinline__ void block_candidates(Candidates &candidates) {
  __shared__ float scores[MAX_CANDIDATES][32], sums[32];
  __shared__ int ids[MAX_CANDIDATES][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  warp_candidates(32, candidates);
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) scores[r][warp] = candidates.scores[r], ids[r][warp] = candidates.ids[r];
    sums[warp] = candidates.sum;
  }
  __syncthreads();
  if (warp > 0) return;
  candidates = Candidates();
  if (lane < blockDim.x / 32) {
#pragma unroll
    for (int r = 0; r < MAX_CANDIDATES; r++) candidates.scores[r] = scores[r][lane], candidates.ids[r] = ids[r][lane];
    candidates.sum = sums[lane];
  }
  warp_candidates(32, candidates);
}

// Candidates in memory: scores and ids [.., MAX_CANDIDATES], sums [..].
struct CandidateLists {
  float *scores;
  int *ids;
  float *sums;
  static_assert(MAX_CANDIDATES == 4, "an access of 16 bytes");

  __device__ __forceinline__ void store(size_t index, const Candidates &candidates) const {
    const float *score = candidates.scores;
    const int *id = candidates.ids;
    ((float4 *)scores)[index] = make_float4(score[0], score[1], score[2], score[3]);
    ((int4 *)ids)[index] = make_int4(id[0], id[1], id[2], id[3]);
    sums[index] = candidates.sum;
  }

  __device__ __forceinline__ Candidates load(size_t index) const {
    const float4 score = ((const float4 *)scores)[index];
    const int4 id = ((const int4 *)ids)[index];
    return {{score.x, score.y, score.z, score.w}, {id.x, id.y, id.z, id.w}, sums[index]};
  }
};

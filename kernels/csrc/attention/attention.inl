// Attention of all rows of a step. Which kernel computes a row is chosen here only.

namespace {

// Whether a decode kernel computes the rows of a request, each of which reads the cache there; otherwise rows.inl does. A
// row's result is the same, bit by bit.
bool is_few(const Job& job) {
  if (job.dim % 16 || job.k.block_size % 16) return false;
#if defined(__AMX_BF16__)
  if (job.q.dtype == kBfloat16) return job.rows == 1 && covered_by_amx_decoding(job);
#endif
  return job.rows <= 2;
}

// For head size 128, which all published models have, or any multiple of 16.
template <int DTYPE> void attend_floats(const Job& job) {
  job.dim == 128 ? attend_together<DTYPE, kHeadLines>(job) : attend_together<DTYPE, 0>(job);
}

void attend_few(const Job& job) {
#if defined(__AMX_BF16__)
  if (job.q.dtype == kBfloat16) return job.k.dtype == kInt8 ? attend_amx<kInt8>(job) : attend_amx<kBfloat16>(job);
#endif
  job.k.dtype == kFloat32    ? attend_floats<kFloat32>(job)
  : job.k.dtype == kBfloat16 ? attend_floats<kBfloat16>(job)
  : job.k.dtype == kFloat16  ? attend_floats<kFloat16>(job)
                             : attend_floats<kInt8>(job);
}

void attend_many(const Job& job) {
#if defined(__AMX_BF16__)
  if (job.q.dtype == kBfloat16) return attend_rows<AmxProducts>(job);
#endif
  job.causal ? attend_rows<FloatProducts<true>>(job) : attend_rows<FloatProducts<false>>(job);
}

// Heads in a job of few rows: as many as leave enough jobs for all threads, so that runs are long. Heads are computed
// separately, so that results do not depend on it.
int64_t heads_at_once(int64_t heads, int64_t requests) {
  const int64_t wanted = heads * requests / (2 * qvl_threads());
  return wanted < 1 ? 1 : wanted < kMostHeads ? wanted : kMostHeads;
}

// The rows of request r, the tokens that they attend to, and the blocks that hold these.
void check_request(const int64_t* starts, const int64_t* contexts, const int64_t* table, int64_t r, int64_t table_width,
                   int64_t block_size, int64_t blocks, int64_t causal) {
  const int64_t rows = starts[r + 1] - starts[r], tokens = contexts[r];
  QVL_CHECK(starts[r] >= 0 && rows >= 0);
  QVL_CHECK(tokens >= 0 && tokens <= table_width * block_size && (!causal || rows <= tokens));
  check_range(table, (tokens + block_size - 1) / block_size, 0, blocks);
}

// q: rows of `heads` heads of `dim` channels, q_row and q_head elements apart; request r has the rows starts[r] to
// starts[r + 1], the last of its contexts[r] tokens if `causal`, and otherwise attends to all of them. Keys and values: the
// request's blocks are tables[r * table_width ..], of block_size tokens, with the given strides. Strides of a plain
// tensor [requests, tokens, ..] make it a cache with a block for each request. y [rows, heads * dim].
void attention(const void* q, int64_t dtype, int64_t q_row, int64_t q_head, int64_t heads, int64_t dim, const void* keys,
               const void* values, int64_t cache_dtype, int64_t blocks, int64_t block_size, int64_t per_block, int64_t per_head,
               int64_t per_row, const int64_t* tables, int64_t table_width, int64_t requests, const int64_t* starts,
               const int64_t* contexts, int64_t causal, void* y) {
  QVL_CHECK(dim > 0 && dim <= kMostDim && heads > 0 && block_size > 0 && requests >= 0);
  for (int64_t r = 0; r < requests; r++) check_request(starts, contexts, tables + r * table_width, r, table_width, block_size, blocks, causal);
  const Rows from{(void*)q, dtype, q_row, q_head}, to{y, dtype, heads * dim, dim};
  const Cache k{(void*)keys, cache_dtype, block_size, per_block, per_head, per_row};
  const Cache v{(void*)values, cache_dtype, block_size, per_block, per_head, per_row};
  const int64_t group = heads_at_once(heads, requests), groups = (heads + group - 1) / group;
  const auto whole = [&](int64_t r) {
    const int64_t rows = starts[r + 1] - starts[r];
    return Job{from, to, k, v, tables + r * table_width, 0, heads, dim, starts[r], rows, causal ? contexts[r] - rows + 1 : contexts[r], causal};
  };
  const auto parts = [&](int64_t r) { return (starts[r + 1] - starts[r] + kRowsAtOnce - 1) / kRowsAtOnce; };
  const auto jobs_of = [&](int64_t r) { return is_few(whole(r)) ? groups * parts(r) : parts(r) * heads; };
  int64_t jobs = 0;
  for (int64_t r = 0; r < requests; r++) jobs += jobs_of(r);
  parallel(jobs, [&](int64_t i) {
    int64_t r = 0;
    for (; i >= jobs_of(r); r++) i -= jobs_of(r);
    Job job = whole(r);
    if (is_few(job)) {
      job.head = i * group, job.heads = heads - job.head < group ? heads - job.head : group;
      return attend_few(job);
    }
    // the last rows of a prompt attend to the most keys: start with them
    const int64_t first = (parts(r) - 1 - i / heads) * kRowsAtOnce;
    job.head = i % heads, job.heads = 1;
    job.row += first, job.seen = job.sees(first), job.rows = job.rows - first < kRowsAtOnce ? job.rows - first : kRowsAtOnce;
    attend_many(job);
  });
}

}  // namespace

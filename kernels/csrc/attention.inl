// The attention of all rows of a step, and the one place where it is chosen how a row is computed.

namespace {

// Rows of a request up to which each reads the cache on its own: with more, the products take over.
#if defined(__AMX_BF16__)
int64_t few(int64_t dtype) { return dtype == kBfloat16 ? 1 : 2; }
#else
int64_t few(int64_t) { return 2; }
#endif

// A job of a request with `rows` rows in this step.
void attend_job(const Job& job, int64_t rows) {
  const bool in_place = job.dim % 16 == 0 && job.k.block_size % 16 == 0;
  if (!in_place || rows > few(job.q.dtype)) {
#if defined(__AMX_BF16__)
    if (job.q.dtype == kBfloat16) return attend_rows<AmxProducts>(job);
#endif
    return attend_rows<FloatProducts>(job);
  }
  const Attend run = attend_one(job.k.dtype, job.dim);
  float* x = scratch<float>(0, 2 * kMostDim);
  for (int64_t r = 0; r < job.rows; r++) {
    const void* q = job.q.vector(job.row + r, job.head);
    for (int64_t i = 0; i < job.dim; i += 16) store(x + i, load_as(q, job.q.dtype, i));
    run(x, job.k, job.v, job.table, job.head, job.dim, job.sees(r), x + kMostDim);
    void* y = job.y.vector(job.row + r, job.head);
    for (int64_t i = 0; i < job.dim; i += 16) store_as(y, job.y.dtype, i, load(x + kMostDim + i));
  }
}

// q: rows of `heads` heads of `dim` channels, q_row and q_head elements apart; request r has the rows starts[r] to
// starts[r + 1], the last of its contexts[r] tokens where `causal`, and sees them all where not. Keys and values: the
// request's blocks are tables[r * table_width ..], of block_size tokens, with the given strides. Strides of a plain
// tensor [requests, tokens, ..] make it a cache with a block for each request. y [rows, heads * dim].
void attention(const void* q, int64_t dtype, int64_t q_row, int64_t q_head, int64_t heads, int64_t dim, const void* keys,
               const void* values, int64_t cache_dtype, int64_t block_size, int64_t per_block, int64_t per_head,
               int64_t per_row, const int64_t* tables, int64_t table_width, int64_t requests, const int64_t* starts,
               const int64_t* contexts, int64_t causal, void* y) {
  const Rows from{(void*)q, dtype, q_row, q_head}, to{y, dtype, heads * dim, dim};
  const Cache k{(void*)keys, cache_dtype, block_size, per_block, per_head, per_row};
  const Cache v{(void*)values, cache_dtype, block_size, per_block, per_head, per_row};
  const auto parts = [&](int64_t r) { return (starts[r + 1] - starts[r] + kRowsAtOnce - 1) / kRowsAtOnce; };
  int64_t jobs = 0;
  for (int64_t r = 0; r < requests; r++) jobs += parts(r) * heads;
  parallel(jobs, [&](int64_t i) {
    int64_t r = 0;
    for (; i >= parts(r) * heads; r++) i -= parts(r) * heads;
    const int64_t part = parts(r) - 1 - i / heads;  // the last rows of a prompt see the most: first
    const int64_t row = starts[r] + part * kRowsAtOnce, left = starts[r + 1] - row;
    const int64_t seen = causal ? contexts[r] - (starts[r + 1] - row) + 1 : contexts[r];
    const int64_t rows = left < kRowsAtOnce ? left : kRowsAtOnce;
    attend_job({from, to, k, v, tables + r * table_width, i % heads, dim, row, rows, seen, causal}, starts[r + 1] - starts[r]);
  });
}

}  // namespace

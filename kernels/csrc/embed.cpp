// Embedding lookup, concatenation of rows and the rotary tables: ops that move bytes or wait for libm. Compiled once, for
// any machine.
#include <math.h>
#include <string.h>

#include "checked.h"
#include "library.h"
#include "threads.h"

namespace {

// y [count] = the rows of `table` [rows] that `ids` name, each of `bytes` bytes.
void gather_rows(const void* table, int64_t rows, int64_t bytes, const int64_t* ids, int64_t count, void* y) {
  QVL_CHECK(bytes > 0);
  check_range(ids, count, 0, rows);
  parallel_ranges(count, 1 + 65536 / bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) memcpy((char*)y + i * bytes, (const char*)table + ids[i] * bytes, (size_t)bytes);
  });
}

// y [rows] = each row of `left`, of left_bytes, followed by the same row of `right`, of right_bytes.
void side_by_side(const void* left, int64_t left_bytes, const void* right, int64_t right_bytes, int64_t rows, void* y) {
  for (int64_t i = 0; i < rows; i++) {
    char* to = (char*)y + i * (left_bytes + right_bytes);
    memcpy(to, (const char*)left + i * left_bytes, (size_t)left_bytes);
    memcpy(to + left_bytes, (const char*)right + i * right_bytes, (size_t)right_bytes);
  }
}

// cos, sin [rows, 2 * half] of position * frequency, a product rounded to float32; both halves are the same. They are
// computed in float64 and rounded to nearest. logn [rows]: log(position + 1) / log(from), at least 1; all 1 if `from`
// is 0.
void rotary_tables(const int64_t* positions, const float* frequencies, int64_t rows, int64_t half, int64_t from, float* cosines,
                   float* sines, float* logn) {
  const double base = from ? log((double)from) : 0;
  parallel_ranges(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float *c = cosines + row * 2 * half, *s = sines + row * 2 * half;
      for (int64_t j = 0; j < half; j++) {
        const double angle = (float)positions[row] * frequencies[row * half + j];
        c[j] = c[j + half] = (float)cos(angle);
        s[j] = s[j + half] = (float)sin(angle);
      }
      const double factor = from ? log((double)positions[row] + 1) / base : 1;
      logn[row] = (float)(factor > 1 ? factor : 1);
    }
  });
}

const Entry kEntries[] = {
    QVL_ENTRY(gather_rows),
    QVL_ENTRY(side_by_side),
    QVL_ENTRY(rotary_tables),
    QVL_END,
};

}  // namespace

const Entry* entries_embed() { return kEntries; }

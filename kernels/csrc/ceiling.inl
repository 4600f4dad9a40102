// How fast memory can be read at best: what memory-bound kernels are held against, in the same run.

namespace {

// Adds up `bytes`, a multiple of 64, a megabyte a chunk; the sum is stored so that nothing is left out.
void read_memory(const uint8_t* memory, int64_t bytes, int32_t* total) {
  int32_t* sums = scratch<int32_t>(2, (bytes >> 20) + 1);
  parallel_ranges(bytes, 1 << 20, [&](int64_t begin, int64_t end) {
    I a = iset1(0), b = a;
    int64_t i = begin;
    for (; i + 128 <= end; i += 128) {
      a = add_bytes(a, load_bytes(memory + i));
      b = add_bytes(b, load_bytes(memory + i + 64));
    }
    sums[begin >> 20] = isum(iadd(a, b));
  });
  *total = sums[0];
}

}  // namespace

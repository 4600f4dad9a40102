// The memory bandwidth roofline that memory-bound kernels are compared with, measured in the same run.

namespace {

// Adds up `bytes`, a multiple of 64, a megabyte a chunk in eight streams: kernels read several at once, and must not beat
// the roofline. The sum is stored so that the compiler removes nothing.
void read_memory(const uint8_t* memory, int64_t bytes, int32_t* total) {
  int32_t* sums = scratch<int32_t>(2, (bytes >> 20) + 1);
  parallel_ranges(bytes, 1 << 20, [&](int64_t begin, int64_t end) {
    constexpr int64_t kStreams = 8;
    const int64_t stream = (end - begin) / kStreams / 64 * 64;
    I parts[kStreams];
    for (I& part : parts) part = iset1(0);
    for (int64_t i = 0; i < stream; i += 64)
QVL_UNROLL
      for (int64_t s = 0; s < kStreams; s++)
        parts[s] = add_bytes(parts[s], load_bytes(memory + begin + s * stream + i));
    for (int64_t i = begin + kStreams * stream; i < end; i += 64) parts[0] = add_bytes(parts[0], load_bytes(memory + i));
    for (int64_t s = 1; s < kStreams; s++) parts[0] = iadd(parts[0], parts[s]);
    sums[begin >> 20] = isum(parts[0]);
  });
  *total = sums[0];
}

}  // namespace

// Packs checkpoint tensors into the layout of linear/int8.inl: once, at load; memory-bound.
#include "library.h"
#include "simd/portable.h"

#include "common.h"

namespace {

// Spreads the four nibbles of a 16-bit number to the low halves of four bytes.
inline uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ff;
  return (x | x << 4) & 0x0f0f0f0f;
}

inline uint32_t field(const uint32_t* words, int64_t columns, int64_t bits, int64_t row, int64_t column) {
  const int64_t per_word = 32 / bits;
  return words[row / per_word * columns + column] >> row % per_word * bits & ((1u << bits) - 1);
}

// Packs GPTQ's qweight, uint32 [inputs * bits / 32, outputs], into lines. A word of qweight holds eight (four) inputs of
// an output, as a line does, so that without a permutation a line is sixteen words, with their nibbles reordered.
// Outputs are a multiple of 16. Padding inputs get level 0: their activations are zero.
void pack_gptq(const uint32_t* words, int64_t inputs, int64_t padded, int64_t outputs, int64_t bits, const int32_t* perm,
               uint8_t* lines) {
  check_packed(bits, 32, inputs, padded, outputs, perm);
  QVL_CHECK(inputs * bits % 32 == 0 && outputs % 16 == 0);
  const int64_t per_word = 32 / bits, rows = padded / per_word, stored = inputs / per_word;
  parallel_ranges(outputs / 16, 4, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < rows; j++)
      for (int64_t b = begin; b < end; b++) {
        uint32_t* line = (uint32_t*)(lines + (b * rows + j) * 64);
        for (int64_t n = 0; n < 16; n++) {
          uint32_t word = 0;
          if (!perm) {
            word = j < stored ? words[j * outputs + b * 16 + n] : 0;
          } else {
            for (int64_t i = 0; i < per_word; i++) {
              const int64_t input = perm[j * per_word + i];
              if (input >= 0) word |= field(words, outputs, bits, input, b * 16 + n) << i * bits;
            }
          }
          line[n] = bits == 4 ? spread(word & 0xffff) | spread(word >> 16) << 4 : word;
        }
      }
  });
}

// Quantizes a dense weight [outputs, inputs] of `dtype` to symmetric int8: scale = max |w| / 127 for each output and group.
// scales float16 [blocks, groups, 16], NaN where a weight is not finite; outputs past the last are zeros.
void pack_dense(const void* weight, int64_t dtype, int64_t outputs, int64_t inputs, int64_t padded, int64_t group,
                uint8_t* lines, uint16_t* scales) {
  const int64_t groups = padded / group, words = padded / 4;
  parallel_ranges((outputs + 15) / 16, 1, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, padded);
    for (int64_t b = begin; b < end; b++)
      for (int64_t n = 0; n < 16; n++) {
        const int64_t output = b * 16 + n;
        for (int64_t i = 0; i < padded; i += 16)
          store(row + i, output < outputs && i < inputs ? load_upto(weight, dtype, output * inputs + i, inputs - i) : zero());
        for (int64_t g = 0; g < groups; g++) {
          const uint16_t scale = float_to_half(largest(row + g * group, group) / 127.0f);
          const float size = half_to_float(scale), inverse = size > 0 ? 1.0f / size : 0.0f;
          scales[(b * groups + g) * 16 + n] = scale;
          for (int64_t i = g * group; i < (g + 1) * group; i++) {
            const float level = row[i] * inverse;
            const float held = level > 127.0f ? 127.0f : level < -127.0f ? -127.0f : level;
            lines[(b * words + i / 4) * 64 + n * 4 + i % 4] = (uint8_t)(lrintf(held) + 128);
          }
        }
      }
  });
}

const Entry kEntries[] = {
    QVL_ENTRY(pack_gptq),
    QVL_ENTRY(pack_dense),
    QVL_END,
};

}  // namespace

const Entry* entries_pack() { return kEntries; }

/* Blocks of numbers to four-bit codes: what _search in encoding.py computes, in one pass. */

#include <stdint.h>
#include <string.h>

#define LARGEST_BLOCK 4096
#define SMALLEST 1e-38f

static float as_float(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* numbers [blocks, block_size], float32 or bfloat16, to absmax [blocks] and codes [blocks, block_size / 2].
   bounds [15] are the midpoints, order [16] the codes by ascending value. A block with a NaN has the magnitude NaN. */
void encode_blocks(const void *numbers, int is_bfloat16, int64_t blocks, int64_t block_size, const float *bounds,
                   const uint8_t *order, float *absmax, uint8_t *codes)
{
    uint32_t bits[LARGEST_BLOCK];
    int32_t below[LARGEST_BLOCK];
    for (int64_t block = 0; block < blocks; block++) {
        if (is_bfloat16) {
            const uint16_t *from = (const uint16_t *)numbers + block * block_size;
            for (int64_t i = 0; i < block_size; i++)
                bits[i] = (uint32_t)from[i] << 16;
        } else {
            memcpy(bits, (const float *)numbers + block * block_size, block_size * sizeof(float));
        }
        /* Magnitudes are ordered as their bits are, infinity above all numbers, NaN above infinity. */
        uint32_t largest = 0;
        for (int64_t i = 0; i < block_size; i++) {
            uint32_t magnitude = bits[i] & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        absmax[block] = as_float(largest);
        float factor = 1.0f / (absmax[block] < SMALLEST ? SMALLEST : absmax[block]);
        for (int64_t i = 0; i < block_size; i++) {
            float scaled = as_float(bits[i]) * factor;
            int32_t count = 0;
#pragma GCC unroll 15
            for (int bound = 0; bound < 15; bound++)
                count += scaled > bounds[bound];
            below[i] = count;
        }
        uint8_t *to = codes + block * (block_size / 2);
        for (int64_t i = 0; i < block_size / 2; i++)
            to[i] = (uint8_t)(order[below[2 * i]] << 4 | order[below[2 * i + 1]]);
    }
}

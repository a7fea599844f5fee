#include "inflate.h"

#include <stdint.h>
#include <string.h>

enum { LONGEST = 15, LITERALS = 288, DISTANCES = 30, LENGTH_CODES = 19, END_OF_BLOCK = 256 };

struct stream {
    const unsigned char *from, *end;
    unsigned char *start, *to, *limit;
    uint32_t bits, held; // taken from `from`, not used yet: the lowest `held` of `bits`
    bool broken;         // the stream ended early; bits are zeros from there on
};

// Symbols in the order of their codes, and how many codes have each length (RFC 1951, 3.2.2).
struct code {
    uint16_t count[LONGEST + 1], symbol[LITERALS];
};

static uint32_t take_bits(struct stream *in, uint32_t wanted) {
    while (in->held < wanted) {
        if (in->from == in->end) {
            in->broken = true;
            return 0;
        }
        in->bits |= (uint32_t)*in->from++ << in->held;
        in->held += 8;
    }
    uint32_t found = in->bits & ((1U << wanted) - 1);
    in->bits >>= wanted;
    in->held -= wanted;
    return found;
}

// False if more codes are used than there are, or fewer: none, or one of one bit, may be.
static bool make_code(struct code *code, const unsigned char *lengths, int n) {
    uint16_t first[LONGEST + 1] = {0};
    int left = 1;
    memset(code, 0, sizeof *code);
    for (int i = 0; i < n; i++)
        code->count[lengths[i]]++;
    int used = n - code->count[0];
    code->count[0] = 0;
    for (int bits = 1; bits <= LONGEST; bits++) {
        left = 2 * left - code->count[bits];
        if (left < 0)
            return false;
        first[bits] = (uint16_t)(first[bits - 1] + code->count[bits - 1]);
    }
    for (int i = 0; i < n; i++)
        if (lengths[i])
            code->symbol[first[lengths[i]]++] = (uint16_t)i;
    return !left || !used || (used == 1 && code->count[1]);
}

// A symbol, or -1 where no code is met.
static int decode(struct stream *in, const struct code *code) {
    int value = 0, first = 0, index = 0;
    for (int bits = 1; bits <= LONGEST && !in->broken; bits++) {
        value |= (int)take_bits(in, 1);
        int count = code->count[bits];
        if (value - first < count)
            return in->broken ? -1 : code->symbol[index + value - first];
        index += count;
        first = (first + count) << 1;
        value <<= 1;
    }
    return -1;
}

static bool stored(struct stream *in) {
    in->bits = in->held = 0; // what is left of a byte; no whole byte is ever held here
    if (in->end - in->from < 4)
        return false;
    size_t length = in->from[0] | (size_t)in->from[1] << 8;
    if ((in->from[2] | (size_t)in->from[3] << 8) != (length ^ 0xffff))
        return false;
    in->from += 4;
    if ((size_t)(in->end - in->from) < length || (size_t)(in->limit - in->to) < length)
        return false;
    memcpy(in->to, in->from, length);
    in->from += length;
    in->to += length;
    return true;
}

static bool coded(struct stream *in, const struct code *literals, const struct code *distances) {
    static const uint16_t base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                    31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint16_t far[] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,
                                   33,  49,  65,  97,  129, 193,  257,  385,  513,  769,
                                   1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    for (;;) {
        int symbol = decode(in, literals);
        if (symbol == END_OF_BLOCK)
            return true;
        if (symbol < 0)
            return false;
        if (symbol < END_OF_BLOCK) {
            if (in->to == in->limit)
                return false;
            *in->to++ = (unsigned char)symbol;
            continue;
        }
        int row = symbol - END_OF_BLOCK - 1;
        if (row >= (int)(sizeof base / sizeof *base))
            return false;
        size_t length = base[row] + take_bits(in, row < 8 || row == 28 ? 0 : (uint32_t)row / 4 - 1);
        int column = decode(in, distances);
        if (column < 0 || column >= DISTANCES)
            return false;
        size_t back = far[column] + take_bits(in, column < 4 ? 0 : (uint32_t)column / 2 - 1);
        if (in->broken || back > (size_t)(in->to - in->start) ||
            length > (size_t)(in->limit - in->to))
            return false;
        for (; length; length--, in->to++)
            *in->to = in->to[-(ptrdiff_t)back];
    }
}

static bool fixed(struct stream *in) {
    unsigned char lengths[LITERALS];
    struct code literals, distances;
    for (int i = 0; i < LITERALS; i++)
        lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    make_code(&literals, lengths, LITERALS);
    memset(lengths, 5, DISTANCES + 2);
    make_code(&distances, lengths, DISTANCES + 2);
    return coded(in, &literals, &distances);
}

static bool dynamic(struct stream *in) {
    static const unsigned char order[LENGTH_CODES] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                      11, 4,  12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[LITERALS + DISTANCES + 2] = {0};
    struct code literals, distances;
    int first = (int)take_bits(in, 5) + 257, second = (int)take_bits(in, 5) + 1;
    int given = (int)take_bits(in, 4) + 4, i = 0;
    if (first > 286 || second > DISTANCES)
        return false;
    for (int j = 0; j < given; j++)
        lengths[order[j]] = (unsigned char)take_bits(in, 3);
    if (in->broken || !make_code(&literals, lengths, LENGTH_CODES))
        return false;
    memset(lengths, 0, LENGTH_CODES);
    while (i < first + second) {
        int symbol = decode(in, &literals), times = 1;
        unsigned char value = (unsigned char)symbol;
        if (symbol < 0 || (symbol == 16 && !i))
            return false;
        if (symbol == 16) {
            value = lengths[i - 1];
            times = 3 + (int)take_bits(in, 2);
        } else if (symbol > 16) {
            value = 0;
            times = symbol == 17 ? 3 + (int)take_bits(in, 3) : 11 + (int)take_bits(in, 7);
        }
        if (times > first + second - i)
            return false;
        memset(lengths + i, value, (size_t)times);
        i += times;
    }
    return !in->broken && lengths[END_OF_BLOCK] && make_code(&literals, lengths, first) &&
           make_code(&distances, lengths + first, second) && coded(in, &literals, &distances);
}

bool inflate(const unsigned char *from, size_t length, unsigned char *to, size_t size) {
    struct stream in = {from, from + length, to, to, to + size, 0, 0, false};
    bool last = false;
    while (!last) {
        last = take_bits(&in, 1);
        uint32_t kind = take_bits(&in, 2);
        if (in.broken || kind == 3)
            return false;
        if (!(kind == 0 ? stored(&in) : kind == 1 ? fixed(&in) : dynamic(&in)))
            return false;
    }
    return in.from == in.end && in.to == in.limit;
}

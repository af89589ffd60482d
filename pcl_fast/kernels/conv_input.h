// What a 3x3 convolution reads: channels-last images, as they are or made where they are read, and the border of zeros
// around one of them.

#pragma once

#include <memory>

#include "norm.h"

namespace {

using Buffer = std::unique_ptr<bfloat16[]>;  // not initialised

struct Shape {
    long images, height, width, ins, outs, stride;  // height and width of the input
    long out_height() const { return height / stride; }
    long out_width() const { return width / stride; }
    long in_size() const { return height * width * ins; }  // of an image
    long out_size() const { return out_height() * out_width() * outs; }
    // Channels of the input in memory of ours: pairs need an even number.
    long stored() const { return ins == 3 ? 4 : ins; }
};

inline bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return bfloat16{(uint16_t)(bits >> 16 | 0x40)};
    return bfloat16{(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// What a convolution reads: images as they are. `row` writes the row that begins at value `at` as bfloat16.
template <class T>
struct Plain {
    const T* values;
    void fetch(long at) const { __builtin_prefetch(values + at, 0, 2); }
    void row(bfloat16* out, long at, const Shape& s) const {
        if constexpr (std::is_same_v<T, bfloat16>) {
            std::memcpy((void*)out, values + at, s.width * s.ins * sizeof(bfloat16));
        } else {
            for (long x = 0; x < s.width; ++x)
                for (long i = 0; i < s.stored(); ++i)
                    out[x * s.stored() + i] = i < s.ins ? rounded(values[at + x * s.ins + i]) : bfloat16{0};
        }
    }
};

// Or relu(line(z)), made where it is read.
struct Activated {
    const bfloat16* values;
    Line line;
    void fetch(long at) const { __builtin_prefetch(values + at, 0, 2); }
    void row(bfloat16* out, long at, const Shape& s) const {
        for (long x = 0; x < s.width; ++x)
            for (long c = 0; c < s.ins; c += LANES) {
                const Floats value = line.at(load(values + at + x * s.ins + c), c);
                store(out + x * s.ins + c, relu_of(value));
            }
    }
};

// Or relu(line(z) + residual), which is kept in `y`, too: for a first and only reader. The residual is taken as it is,
// or on a line of its own.
struct Joined {
    const bfloat16 *values, *residual;
    bfloat16* y;
    Line line, residual_line;
    void fetch(long at) const {
        __builtin_prefetch(values + at, 0, 2);
        __builtin_prefetch(residual + at, 0, 2);
    }
    void row(bfloat16* out, long at, const Shape& s) const {
        const auto write = [&](auto residual_at) {
            for (long x = 0; x < s.width; ++x)
                for (long c = 0; c < s.ins; c += LANES) {
                    const long here = at + x * s.ins + c;
                    const Floats value = line.at(load(values + here), c) + residual_at(here, c);
                    store(y + here, relu_of(value));
                    std::memcpy((void*)(out + x * s.ins + c), y + here, LANES * sizeof(bfloat16));
                }
        };
        if (residual_line.scale)
            write([&](long here, long c) { return residual_line.at(load(residual + here), c); });
        else
            write([&](long here, long) { return load(residual + here); });
    }
};

// Room for an image with a border of zeros, [height + 2, width + 2, channels]. Nothing is ever written to the border.
inline Buffer padded_image(long height, long width, long channels) {
    return Buffer(new bfloat16[(height + 2) * (width + 2) * channels]());
}

// One image, inside of that border: `fill(row, y)` writes the pixels of a row.
template <class Fill>
void pad(bfloat16* padded, long height, long width, long channels, Fill fill) {
    for (long y = 0; y < height; ++y) fill(padded + ((y + 1) * (width + 2) + 1) * channels, y);
}

}  // namespace

// Views of images on the CPU: crop, resize by a triangle filter with antialiasing, mirror, jitter, normalise.
//
// A view of `rows x columns` pixels resized from a box of `height x width` has at row i the mean of the box's
// rows j, weighted by max(0, 2 m - |(2 j + 1) rows - (2 i + 1) height|), m = max(height, rows); columns likewise.
// Weights are exact integers until they are divided by their sum, so boxes of any size have them right. Rows
// first: that is a weighted sum of whole rows of bytes. Nothing is rounded in between, and sums are float32.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int COLOURS = 3, CELL = 4;  // a pixel's colours are summed in a register of four
constexpr int JITTERS = 5;            // brightness, contrast, saturation, their order, whether gray
constexpr float WHITE = 255.0f;

typedef float Cell __attribute__((vector_size(4 * CELL), aligned(4)));

}  // namespace

// What is asked of a batch of `batch` images; image b's view v is at place v * batch + b of every array.
struct Job {
    const int64_t* boxes;   // [views, batch, 4]: top, left, height, width
    const int64_t* grids;   // [views, batch, 4]: rows, columns, first row, first column; null: (size, size, 0, 0)
    const uint8_t* flips;   // [views, batch]
    const float* colours;   // [views, batch, 5], or null
    void* out;              // [views, batch, size, size, channels], or [views, batch, 3, size, size] if planar
    int64_t views, batch, size, channels, planar, half;  // half: bfloat16, otherwise float32
    float scale[COLOURS], shift[COLOURS];                // normalised = pixel * scale + shift
};

namespace {

// For each of `size` places along one side: the first of `count` neighbours and their weights.
struct Taps {
    long count = 0;
    std::vector<long> first;
    std::vector<float> weights;

    void fill(long side, long cells, long offset, long size, bool mirror) {
        const long widest = std::max(side, cells);
        count = std::min(side, (2 * widest + cells - 1) / cells);
        first.resize(size);
        weights.resize(size * count);
        for (long place = 0; place < size; ++place) {
            const long centre = (2 * (offset + (mirror ? size - 1 - place : place)) + 1) * side;
            const long nearest = std::max(centre - 2 * widest + cells, 0L) / (2 * cells);
            first[place] = std::min(nearest, side - count);
            long sum = 0;
            for (long tap = 0; tap < count; ++tap) sum += weigh(first[place] + tap, centre, cells, widest);
            for (long tap = 0; tap < count; ++tap)
                weights[place * count + tap] =
                    float(double(weigh(first[place] + tap, centre, cells, widest)) / double(sum));
        }
    }

    static long weigh(long at, long centre, long cells, long widest) {
        return std::max(2 * widest - std::labs((2 * at + 1) * cells - centre), 0L);
    }
};

// Sums `count` rows of bytes, `stride` apart, into `length` floats.
template <int COUNT>
[[gnu::noinline]] void sum_rows(const uint8_t* __restrict rows, long stride, const float* __restrict weights,
                                long count, long length, float* __restrict sums) {
    if constexpr (COUNT) {
        for (long at = 0; at < length; ++at) {
            float sum = 0;
            for (int tap = 0; tap < COUNT; ++tap) sum += weights[tap] * float(int(rows[tap * stride + at]));
            sums[at] = sum;
        }
    } else {
        sum_rows<4>(rows, stride, weights, 4, length, sums);
        for (long tap = 4; tap < count; ++tap)
            for (long at = 0; at < length; ++at)
                sums[at] += weights[tap] * float(int(rows[tap * stride + at]));
    }
}

inline Cell load(const float* p) {
    Cell cell;
    std::memcpy(&cell, p, sizeof cell);
    return cell;
}

inline void store(float* p, Cell cell) { std::memcpy(p, &cell, sizeof cell); }

// Sums neighbours in a row of pixels for each place of a view; writes one float beyond its end. Inlined, it takes
// half as long again: its constants then lie in memory.
template <int COUNT>
[[gnu::noinline]] void sum_columns(const float* row, const Taps& taps, Cell scale, Cell shift, float* out) {
    const long count = COUNT ? COUNT : taps.count, size = taps.first.size();
    const float* weights = taps.weights.data();
    for (long place = 0; place < size; ++place, weights += count) {
        const float* pixel = row + COLOURS * taps.first[place];
        Cell sum = {};
        for (long tap = 0; tap < count; ++tap) sum += weights[tap] * load(pixel + COLOURS * tap);
        store(out + COLOURS * place, sum * scale + shift);
    }
}

// Calls work with the number of taps as a constant, where it is small, so that its loops are unrolled; else 0.
template <class Work>
inline void with_count(long count, Work work) {
    switch (count) {
        case 1: return work(std::integral_constant<int, 1>{});
        case 2: return work(std::integral_constant<int, 2>{});
        case 3: return work(std::integral_constant<int, 3>{});
        case 4: return work(std::integral_constant<int, 4>{});
        case 5: return work(std::integral_constant<int, 5>{});
        default: return work(std::integral_constant<int, 0>{});
    }
}

inline float gray_of(const float* pixel) { return 0.2989f * pixel[0] + 0.587f * pixel[1] + 0.114f * pixel[2]; }

// Moves every colour away from `anchor(pixel)` by the factor, within black and white.
template <class Anchor>
void blend(float* view, long pixels, float factor, Anchor anchor) {
    for (long at = 0; at < pixels * COLOURS; at += COLOURS) {
        const float from = anchor(view + at);
        for (int c = 0; c < COLOURS; ++c)
            view[at + c] = std::clamp(from + factor * (view[at + c] - from), 0.0f, WHITE);
    }
}

// Jitters the colours of a view in place: the three factors in one of their six orders, then perhaps gray.
void jitter(float* view, long pixels, const float* colours) {
    constexpr int ORDERS[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    for (const int which : ORDERS[int(colours[3])]) {
        if (which == 0) blend(view, pixels, colours[0], [](const float*) { return 0.0f; });
        if (which == 1) {
            double total = 0.0;
            for (long pixel = 0; pixel < pixels; ++pixel) total += gray_of(view + pixel * COLOURS);
            blend(view, pixels, colours[1], [mean = float(total / pixels)](const float*) { return mean; });
        }
        if (which == 2) blend(view, pixels, colours[2], gray_of);
    }
    if (colours[4] != 0.0f) blend(view, pixels, 0.0f, gray_of);
}

inline void put(float* out, float value) { *out = value; }

// Rounds to the nearest bfloat16, ties to even; every value is finite.
inline void put(uint16_t* out, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *out = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Writes one row of a view where the job wants it.
template <class T>
void emit(const Job& job, const float* row, T* view, long y) {
    const auto spread = [&](auto channels) {
        T* out = view + y * job.size * channels;
        for (long x = 0; x < job.size; ++x)
            for (int c = 0; c < channels; ++c)
                put(out + x * channels + c, c < COLOURS ? row[x * COLOURS + c] : 0.0f);
    };
    if (job.planar)
        for (int c = 0; c < COLOURS; ++c)
            for (long x = 0; x < job.size; ++x)
                put(view + (c * job.size + y) * job.size + x, row[x * COLOURS + c]);
    else if (job.channels == 8)
        spread(std::integral_constant<int, 8>{});
    else if (job.channels == 4)
        spread(std::integral_constant<int, 4>{});
    else
        for (long i = 0; i < job.size * COLOURS; ++i) put(view + y * job.size * COLOURS + i, row[i]);
}

// The memory of one thread, kept from view to view.
struct Scratch {
    Taps rows, columns;
    std::vector<float> sums, row, view;
};

// Calls take(y, row) for each row of a view: pixels * scale + shift, one after the other.
template <class Take>
void resample(const Job& job, const uint8_t* pixels, long stride, long place, Scratch& scratch, Cell scale,
              Cell shift, Take take) {
    const int64_t whole[] = {job.size, job.size, 0, 0};
    const int64_t *box = job.boxes + 4 * place, *grid = job.grids ? job.grids + 4 * place : whole;
    const long length = box[3] * COLOURS;
    Taps &rows = scratch.rows, &columns = scratch.columns;
    std::vector<float>&sums = scratch.sums, &row = scratch.row;
    rows.fill(box[2], grid[0], grid[2], job.size, false);
    columns.fill(box[3], grid[1], grid[3], job.size, job.flips[place]);
    sums.resize(length + 1);  // a register holds a fourth number
    row.resize(job.size * COLOURS + 1);
    pixels += box[0] * stride + box[1] * COLOURS;
    for (long y = 0; y < job.size; ++y) {
        const uint8_t* first = pixels + rows.first[y] * stride;
        const float* weights = &rows.weights[y * rows.count];
        with_count(rows.count, [&](auto taps) {
            sum_rows<taps>(first, stride, weights, rows.count, length, sums.data());
        });
        with_count(columns.count, [&](auto taps) {
            sum_columns<taps>(sums.data(), columns, scale, shift, row.data());
        });
        take(y, row.data());
    }
}

template <class T>
void make_view(const Job& job, const uint8_t* pixels, long stride, long place, Scratch& scratch) {
    const Cell scale = {job.scale[0], job.scale[1], job.scale[2], 0};
    const Cell shift = {job.shift[0], job.shift[1], job.shift[2], 0};
    const long length = job.size * COLOURS;
    T* out = static_cast<T*>(job.out) + place * job.size * job.size * job.channels;
    const auto write = [&](long y, const float* row) { emit(job, row, out, y); };
    if (!job.colours) return resample(job, pixels, stride, place, scratch, scale, shift, write);

    scratch.view.resize(job.size * length);
    float* view = scratch.view.data();
    resample(job, pixels, stride, place, scratch, Cell{1, 1, 1, 1}, Cell{},
             [&](long y, const float* row) { std::copy(row, row + length, view + y * length); });
    jitter(view, job.size * job.size, job.colours + JITTERS * place);
    for (long i = 0; i < job.size * length; ++i) view[i] = view[i] * scale[i % COLOURS] + shift[i % COLOURS];
    for (long y = 0; y < job.size; ++y) write(y, view + y * length);
}

}  // namespace

extern "C" {

// All views of image `index` of the batch, in this thread. `stride`: bytes from row to row of its RGB pixels.
void views_of_image(const Job* job, const uint8_t* pixels, int64_t stride, int64_t index) {
    thread_local Scratch scratch;
    for (int64_t view = 0; view < job->views; ++view) {
        const int64_t place = view * job->batch + index;
        if (job->half)
            make_view<uint16_t>(*job, pixels, stride, place, scratch);
        else
            make_view<float>(*job, pixels, stride, place, scratch);
    }
}

// All views of a batch whose images are `image_stride` bytes apart, by so many threads.
void views_of_batch(const Job* job, const uint8_t* pixels, int64_t stride, int64_t image_stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t index = 0; index < job->batch; ++index)
        views_of_image(job, pixels + index * image_stride, stride, index);
}
}

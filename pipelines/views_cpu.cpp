// Views of images on the CPU: crop, resize by a triangle filter with antialiasing, mirror, jitter, normalise.
//
// A view of `rows x columns` pixels resized from a box of `height x width` has at row i the mean of the box's rows j,
// weighted by max(0, 2 m - |(2 j + 1) rows - (2 i + 1) height|), m = max(height, rows); columns likewise. Weights are
// exact integers until they are divided by their sum, so boxes of any size have them right. Rows first: that is
// a weighted sum of whole rows of bytes. Nothing is rounded in between, and sums are float32.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int LANES = 16, COLOURS = 3, CELL = 4;  // a pixel's colours are summed in a register of four
constexpr int JITTERS = 5;                        // brightness, contrast, saturation, their order, whether gray
constexpr float WHITE = 255.0f;

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
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

inline Floats widen(Bytes bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, Words), Floats); }

// Sums `count` rows of bytes, `stride` apart, into `length` floats.
template <int COUNT>
void sum_rows(const uint8_t* rows, long stride, const float* weights, long count, long length, float* sums) {
    const long taps = COUNT ? COUNT : count;
    const auto block = [&](long at, long bytes) {
        Floats sum = {};
        for (long tap = 0; tap < taps; ++tap) {
            Bytes pixels = {};
            std::memcpy(&pixels, rows + tap * stride + at, bytes);
            sum += weights[tap] * widen(pixels);
        }
        std::memcpy(sums + at, &sum, sizeof sum);
    };
    long at = 0;
    for (; at + LANES <= length; at += LANES) block(at, LANES);
    if (at < length) block(at, length - at);
}

inline Cell load(const float* p) {
    Cell cell;
    std::memcpy(&cell, p, sizeof cell);
    return cell;
}

inline void store(float* p, Cell cell) { std::memcpy(p, &cell, sizeof cell); }

// Sums neighbours in a row of pixels for each place of the view; writes one float beyond its end.
template <int COUNT>
void sum_columns(const float* row, const Taps& taps, Cell scale, Cell shift, float* view) {
    const long count = COUNT ? COUNT : taps.count, size = taps.first.size();
    const float* weights = taps.weights.data();
    for (long place = 0; place < size; ++place, weights += count) {
        const float* pixel = row + COLOURS * taps.first[place];
        Cell sum = weights[0] * load(pixel);
        for (long tap = 1; tap < count; ++tap) sum += weights[tap] * load(pixel + COLOURS * tap);
        store(view + COLOURS * place, sum * scale + shift);
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
    if (job.planar) {
        for (int c = 0; c < COLOURS; ++c)
            for (long x = 0; x < job.size; ++x)
                put(view + (c * job.size + y) * job.size + x, row[x * COLOURS + c]);
    } else if (job.channels == COLOURS) {
        for (long i = 0; i < job.size * COLOURS; ++i) put(view + y * job.size * COLOURS + i, row[i]);
    } else {
        T* out = view + y * job.size * job.channels;
        for (long x = 0; x < job.size; ++x, out += job.channels)
            for (int c = 0; c < job.channels; ++c) put(out + c, c < COLOURS ? row[x * COLOURS + c] : 0.0f);
    }
}

// The memory of one thread, kept from view to view.
struct Scratch {
    Taps rows, columns;
    std::vector<float> sums, row, view;
};

template <class T>
void make_view(const Job& job, const uint8_t* pixels, long stride, long place, Scratch& scratch) {
    const int64_t whole[] = {job.size, job.size, 0, 0};
    const int64_t *box = job.boxes + 4 * place, *grid = job.grids ? job.grids + 4 * place : whole;
    const long size = job.size, length = box[3] * COLOURS;
    auto& [rows, columns, sums, row, view] = scratch;
    rows.fill(box[2], grid[0], grid[2], size, false);
    columns.fill(box[3], grid[1], grid[3], size, job.flips[place]);
    sums.resize(length + LANES);
    row.resize(size * COLOURS + 1);
    const float* colours = job.colours ? job.colours + JITTERS * place : nullptr;
    if (colours) view.resize(size * size * COLOURS + 1);

    const Cell normal = {job.scale[0], job.scale[1], job.scale[2], 0}, one = {1, 1, 1, 1};
    const Cell shift = {job.shift[0], job.shift[1], job.shift[2], 0};
    T* out = static_cast<T*>(job.out) + place * size * size * job.channels;
    pixels += box[0] * stride + box[1] * COLOURS;
    for (long y = 0; y < size; ++y) {
        const uint8_t* first = pixels + rows.first[y] * stride;
        const float* weights = &rows.weights[y * rows.count];
        with_count(rows.count, [&](auto count) {
            sum_rows<count>(first, stride, weights, rows.count, length, sums.data());
        });
        with_count(columns.count, [&](auto count) {
            if (colours)
                sum_columns<count>(sums.data(), columns, one, Cell{}, &view[y * size * COLOURS]);
            else
                sum_columns<count>(sums.data(), columns, normal, shift, row.data());
        });
        if (!colours) emit(job, row.data(), out, y);
    }
    if (!colours) return;
    jitter(view.data(), size * size, colours);
    for (long y = 0; y < size; ++y) {
        for (long i = 0; i < size * COLOURS; ++i)
            row[i] = view[y * size * COLOURS + i] * job.scale[i % COLOURS] + job.shift[i % COLOURS];
        emit(job, row.data(), out, y);
    }
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

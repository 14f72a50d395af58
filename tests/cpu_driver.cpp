// Calls of the compiled CPU backend on ragged sizes, from one thread and from several at once, to be run under sanitizers
// (make sanitize): every byte of what is read and written has its own allocation. The numbers are tested in Python.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

extern "C" int64_t lowrank_dense_forward(const void *);
extern "C" int64_t lowrank_dense_backward(const void *);
extern "C" int64_t lowrank_dense_samples(const void *);
extern "C" int64_t lowrank_dense_samples_backward(const void *);
extern "C" int64_t lowrank_stencil_product(const void *);
extern "C" int64_t lowrank_stencil_backward(const void *);
extern "C" int64_t lowrank_stencil_solve(const void *);
extern "C" int lowrank_use_variant(const char *);

namespace {

const int64_t SIZES[] = {4, 8, 2, 2};

// A tensor of float32, float64, bfloat16 or float16, with values in [1, 2) or so.
struct Array {
    std::vector<char> bytes;
    int64_t kind, strides[3];

    Array(int64_t kind, int64_t i, int64_t j, int64_t k, bool swapped = false) : kind(kind) {
        const int64_t count = i * j * k;
        bytes.resize(count * SIZES[kind]);
        bytes.shrink_to_fit();
        std::minstd_rand random(count + kind);
        for (int64_t n = 0; n < count; n++) {
            const double value = 1 + double(random() % 1000) / 1000;
            const float narrow = float(value);
            uint32_t word;
            std::memcpy(&word, &narrow, 4);
            const uint16_t half = kind == 2 ? uint16_t(word >> 16) : uint16_t(0x3C00 | (word >> 13 & 0x3FF));
            if (kind == 0) std::memcpy(&bytes[4 * n], &narrow, 4);
            else if (kind == 1) std::memcpy(&bytes[8 * n], &value, 8);
            else std::memcpy(&bytes[2 * n], &half, 2);
        }
        strides[0] = j * k, strides[1] = swapped ? 1 : k, strides[2] = swapped ? j : 1;
    }
    int64_t address() const { return int64_t(bytes.data()); }
};

struct Call {
    std::vector<int64_t> numbers;
    void add(std::initializer_list<int64_t> values) { numbers.insert(numbers.end(), values); }
    void view(const Array &a) { add({a.address(), a.kind, a.strides[0], a.strides[1], a.strides[2]}); }
    void nothing() { add({0, 0, 0, 0, 0}); }
    // With four strides, of which the last is 1.
    void image(const Array &a, int64_t i, int64_t b, int64_t c) { add({a.address(), a.kind, i, b, c, 1}); }
    void no_image() { add({0, 0, 0, 0, 0, 0}); }
};

void all_passes(int64_t S, int64_t B, int64_t N, int64_t R, int64_t kind, bool swapped, bool one_d, int64_t threads) {
    const int64_t result = kind == 1, size = S * B;
    Array x(kind, S, B, N), loc(kind, S, B, N), P(kind, B, N, R, swapped), d(kind, 1, B, one_d ? 1 : N);
    Array L_inv(1, B, R, R), logdet(1, 1, 1, B), q(1, 1, S, B), v(1, S, B, R), step(1, S, B, R), a(1, 1, S, B), b(1, 1, 1, B);
    Array residual(result, S, B, N), grad_x(kind, S, B, N), grad_loc(kind, S, B, N), grad_P(kind, B, N, R, swapped);
    Array grad_d(kind, 1, B, one_d ? 1 : N), omega_p(kind, S, B, R), y(kind, S, B, N);
    std::vector<uint8_t> wide(B), flags(B);
    const int64_t of_wide = int64_t(wide.data()), of_flags = int64_t(flags.data());
    for (int64_t given = 0; given < 2; given++) {
        Call call;
        call.add({S, B, N, R, threads});
        for (const Array *t : {&x, &loc, &P, &d}) call.view(*t);
        call.add({one_d, 0, result, given, 0, 0, L_inv.address(), logdet.address(), of_wide, of_flags});
        call.add({size ? q.address() : 0, v.address(), step.address(), residual.address()});
        lowrank_dense_forward(call.numbers.data());
    }
    Call back;
    back.add({S, B, N, R, threads});
    for (const Array *t : {&x, &loc, &P, &d}) back.view(*t);
    back.add({one_d, result, S, a.address(), b.address(), L_inv.address(), v.address(), step.address(), of_wide});
    for (const Array *t : {&residual, &grad_x, &grad_loc, &grad_P, &grad_d}) back.view(*t);
    back.add({of_flags});
    lowrank_dense_backward(back.numbers.data());
    Call sample;
    sample.add({S, B, N, R, threads});
    for (const Array *t : {&loc, &P, &d, &omega_p, &x}) sample.view(*t);
    sample.add({one_d, result});
    sample.view(y);
    lowrank_dense_samples(sample.numbers.data());
    Call sample_back;
    sample_back.add({S, B, N, R, threads});
    for (const Array *t : {&y, &P, &d, &omega_p, &x}) sample_back.view(*t);
    sample_back.add({one_d, result});
    for (const Array *t : {&grad_P, &grad_d, &grad_x}) sample_back.view(*t);
    lowrank_dense_samples_backward(sample_back.numbers.data());
}

// Stencils of 3 × 3 on images of H × W: tied channels, each with its own, or independent ones that share one.
void stencil_passes(int64_t S, int64_t B, int64_t channels, int64_t H, int64_t W, int64_t kind, bool tied, int64_t threads) {
    const int64_t result = kind == 1, n = H * W, item = channels * n, pairs = channels * (channels - 1) / 2;
    const int64_t rows = tied ? channels : 1, own = tied ? n : 0, spatial[] = {H, W}, offsets[] = {0, 1, 1, -1, 1, 0, 1, 1};
    const auto near = {int64_t(2), int64_t(4), int64_t(spatial), int64_t(offsets)};
    Array x(kind, S, B, item), loc(kind, 1, B, item), log_t(kind, B, rows, n), t(result, B, rows, n);
    Array s(kind, B, rows, 4 * n), m(kind, B, pairs, n), y(result, S, B, item), grad_y(result, S, B, item);
    Array squares(1, 1, S, B), logs(1, 1, 1, B), grad_x(kind, S, B, item), grad_loc(kind, 1, B, item);
    Array grad_t(kind, B, rows, n), grad_s(kind, B, rows, 4 * n), grad_m(kind, B, pairs, n);
    const bool ties = tied && pairs;
    const auto weights = [&](Call &call, bool logarithms) {
        if (logarithms) call.image(log_t, 0, rows * n, own);
        call.image(t, 0, rows * n, own);
        call.image(s, n, rows * 4 * n, 4 * own);
        ties ? call.image(m, n, pairs * n, 0) : call.no_image();
    };
    Call product;
    product.add({S, B, channels, threads, result});
    product.add(near);
    product.image(x, B * item, item, n);
    product.image(loc, 0, item, n);
    weights(product, true);
    product.add({y.address(), squares.address(), logs.address()});
    lowrank_stencil_product(product.numbers.data());
    Call back;
    back.add({S, B, channels, rows, threads, result});
    back.add(near);
    back.image(x, B * item, item, n);
    back.image(loc, 0, item, n);
    weights(back, false);
    for (const Array *of : {&y, &grad_y}) back.image(*of, B * item, item, n);
    back.add({squares.address(), logs.address()});
    for (const Array *grad : {&grad_x, &grad_loc, &grad_t, &grad_s}) back.image(*grad, 0, 0, 0);
    ties ? back.image(grad_m, 0, 0, 0) : back.no_image();
    back.add({1});
    lowrank_stencil_backward(back.numbers.data());
    for (int64_t transposed = 0; transposed < 2; transposed++) {
        Call solve;
        solve.add({S, B, channels, threads, transposed, result});
        solve.add(near);
        solve.image(x, B * item, item, n);
        weights(solve, false);
        solve.add({y.address()});
        lowrank_stencil_solve(solve.numbers.data());
    }
}

void ragged(int64_t threads) {
    const int64_t shapes[][4] = {{1, 1, 1, 1},   {1, 3, 7, 2},    {2, 2, 9, 8},    {1, 2, 257, 9},   {3, 1, 300, 26},
                                 {1, 9, 31, 5},  {40, 2, 65, 3},  {1, 1, 513, 40}, {1, 1, 5000, 3},  {0, 2, 20, 4},
                                 {1, 0, 20, 4},  {1, 2, 0, 4},    {1, 300, 2, 1},  {1, 20, 8, 4},    {1, 2, 3, 7}};
    for (const auto &s : shapes)
        for (int64_t kind = 0; kind < 4; kind++)
            for (int way = 0; way < 4; way++) all_passes(s[0], s[1], s[2], s[3], kind, way & 1, way & 2, threads);
    const int64_t images[][5] = {{1, 1, 1, 2, 2},  {1, 2, 3, 3, 9},  {2, 1, 3, 70, 33}, {5, 2, 2, 5, 4},
                                 {17, 1, 1, 3, 8}, {40, 2, 3, 4, 7}, {0, 2, 1, 4, 4},   {1, 0, 3, 4, 4}};
    for (const auto &s : images)
        for (int64_t kind = 0; kind < 4; kind++)
            for (bool tied : {false, true}) stencil_passes(s[0], s[1], s[2], s[3], s[4], kind, tied, threads);
}

} // namespace

int main() {
    int variants = 0;
    for (const char *name : {"baseline", "avx2", "avx512"}) {
        if (lowrank_use_variant(name)) continue;
        variants++;
        ragged(1);
        ragged(4);
        std::vector<std::thread> callers;
        for (int i = 0; i < 3; i++) callers.emplace_back([] { ragged(3); });
        for (std::thread &caller : callers) caller.join();
    }
    std::printf("%d variants\n", variants);
    return variants == 0;
}

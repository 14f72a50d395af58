// The forward pass: sums of chunks, R x R algebra of items, residuals of chunks, and the last step of items.
//
// Where there are many items a unit of work is an item, whose P is then still in the cache when it is read again; else
// every step is shared out by chunks. Either way each number is made by the same operations in the same order.
#include <cmath>
#include <new>

#include "../../../device/csrc/algebra.h"
#include "dense.h"

namespace VARIANT {
namespace {

thread_local Scratch parts_of_item, matrices;

constexpr double FLOAT32_EPS = 0x1p-23;
constexpr double LOG_DET_TOLERANCE = 0.01; // nats; as `capacitance.LOG_DET_TOLERANCE`
constexpr int64_t ITEMS_PER_THREAD = 4;

class Run {
  public:
    explicit Run(const Forward &call) : call(call) {}

    int64_t run() {
        work_through();
        int64_t rough = 0;
        for (int64_t b = 0; !call.given && b < B; b++) rough += call.rough[b];
        return rough;
    }

  private:
    const Forward &call;
    const int64_t S = call.S, B = call.B, N = call.N, R = call.R;
    const int64_t chunk = chunk_pixels(R), chunks = parts(N, chunk), groups = parts(S, GROUP);
    const bool apart = S && (call.given || S > GROUP); // w is made in a pass of its own
    const int64_t joined = apart ? 0 : S;              // samples whose w is made with PᵀD⁻¹P
    // Sums of an item: of each chunk PᵀD⁻¹P, w, log|D|; w of a pass of its own; q(v) and PᵀD⁻¹r.
    const int64_t of_C = sums_size(R, joined), of_w = apart ? S * R : 0, of_q = S, of_g = S * R;
    const int64_t size = chunks * (of_C + of_w + of_q + of_g);
    double *everywhere = nullptr;

    void work_through() {
        for (int64_t b = 0; !call.given && b < B; b++) call.wide[b] = call.in_double != 0, call.rough[b] = 0;
        if (B >= ITEMS_PER_THREAD * call.threads) {
            pool::each(B, call.threads, [this](int64_t b) { item(b); });
            return;
        }
        Scratch room;
        room.reserve(Scratch::bytes<double>(B * size));
        everywhere = room.take<double>(B * size);
        if (!call.given) {
            in_chunks(1, [this](int64_t b, int64_t, int64_t c) { add(b, c); });
            pool::each(B, call.threads, [this](int64_t b) { solve(b); });
            if (!call.in_double) {
                in_chunks(1, [this](int64_t b, int64_t, int64_t c) { if (call.wide[b]) add(b, c); });
                pool::each(B, call.threads, [this](int64_t b) { if (call.wide[b]) solve(b); });
            }
        }
        if (apart) {
            in_chunks(groups, [this](int64_t b, int64_t g, int64_t c) { projection(b, g, c); });
            pool::each(B, call.threads, [this](int64_t b) { coefficients(b); });
        }
        if (!call.q) return;
        in_chunks(groups, [this](int64_t b, int64_t g, int64_t c) { residual(b, g, c); });
        pool::each(B, call.threads, [this](int64_t b) { correct(b); });
    }

    double *place(int64_t b) const { return everywhere ? everywhere + b * size : parts_of_item.take<double>(0); }
    bool doubled(int64_t b) const { return call.in_double || call.wide[b]; }
    int64_t first(int64_t c) const { return c * chunk; }
    int64_t last(int64_t c) const { return least(N, (c + 1) * chunk); }

    template <class F> void in_chunks(int64_t groups, const F &f) const {
        pool::each(B * groups * chunks, call.threads, [&](int64_t unit) {
            f(unit / chunks / groups, unit / chunks % groups, unit % chunks);
        });
    }

    void item(int64_t b) const {
        parts_of_item.reserve(Scratch::bytes<double>(size));
        for (int64_t c = 0; !call.given && c < chunks; c++) add(b, c);
        if (!call.given) solve(b);
        if (!call.given && call.wide[b] && !call.in_double) {
            for (int64_t c = 0; c < chunks; c++) add(b, c);
            solve(b);
        }
        for (int64_t i = 0; apart && i < groups * chunks; i++) projection(b, i / chunks, i % chunks);
        if (apart) coefficients(b);
        if (!call.q) return;
        for (int64_t i = 0; i < groups * chunks; i++) residual(b, i / chunks, i % chunks);
        correct(b);
    }

    void add(int64_t b, int64_t c) const {
        double *sums = place(b) + c * of_C;
        for (int64_t i = 0; i < of_C; i++) sums[i] = 0;
        if (doubled(b)) add_up<double>(call, b, first(c), last(c), joined, sums);
        else add_up<float>(call, b, first(c), last(c), joined, sums);
    }

    // L⁻¹ and log|Σ|, whether they are good enough, and v = C⁻¹w.
    void solve(int64_t b) const {
        const int64_t triangle = R * (R + 1) / 2;
        matrices.reserve(Scratch::bytes<double>(of_C) + 2 * Scratch::bytes<double>(R * R) + Scratch::bytes<double>(R));
        double *sums = matrices.take<double>(of_C), *work = matrices.take<double>(R * R);
        double *L_inv = matrices.take<double>(R * R), *diagonal = matrices.take<double>(R);
        if (call.L_inv) L_inv = call.L_inv + b * R * R;
        const double *of_chunks = place(b);
        for (int64_t i = 0; i < of_C; i++) {
            sums[i] = 0;
            for (int64_t c = 0; c < chunks; c++) sums[i] += of_chunks[c * of_C + i];
        }
        double log_D = sums[of_C - 1];
        if (call.one_d) {
            const double d = value(call.d, b), weight = call.inverted ? d : 1 / d;
            for (int64_t i = 0; i < of_C - 1; i++) sums[i] *= weight;
            log_D = double(N) * std::log(d);
        }
        for (int64_t i = 0; call.gram && i < R; i++)
            for (int64_t j = 0; j <= i; j++)
                call.gram[(b * R + i) * R + j] = call.gram[(b * R + j) * R + i] = sums[i * (i + 1) / 2 + j];
        for (int64_t s = 0; call.w && s < joined; s++)
            memcpy(call.w + (s * B + b) * R, sums + triangle + s * R, sizeof(double) * R);
        if (!call.L_inv && call.in_double) return; // nothing but sums was asked for
        double log_C;
        factorise(sums, R, L_inv, &log_C, work);
        if (call.logdet) call.logdet[b] = log_C + log_D;
        inverse_diagonal(L_inv, R, diagonal);
        judge(b, sums, diagonal);
        for (int64_t s = 0; call.v && s < joined; s++)
            VARIANT::solve(L_inv, R, sums + triangle + s * R, call.v + (s * B + b) * R, work);
    }

    // Whether rounding has moved log|C|, or a root of C, too far: README.md of the package has the bounds.
    void judge(int64_t b, const double *sums, const double *inverse) const {
        double root = 0, largest = 0;
        for (int64_t j = 0; j < R; j++) {
            const double inflation = (sums[j * (j + 1) / 2 + j] + 1) * inverse[j];
            root += std::sqrt(inflation);
            largest = inflation > largest ? inflation : largest;
        }
        if (!doubled(b)) call.wide[b] = !(FLOAT32_EPS * root * root <= LOG_DET_TOLERANCE);
        else call.rough[b] = EPS * largest > good_enough(call.in_double);
    }

    void projection(int64_t b, int64_t g, int64_t c) const {
        const int64_t s0 = g * GROUP, s1 = least(S, s0 + GROUP);
        double *w = place(b) + chunks * of_C + (c * S + s0) * R;
        for (int64_t i = 0; i < (s1 - s0) * R; i++) w[i] = 0;
        if (doubled(b)) project<double>(call, b, first(c), last(c), s0, s1, w);
        else project<float>(call, b, first(c), last(c), s0, s1, w);
    }

    // v = C⁻¹w of all samples.
    void coefficients(int64_t b) const {
        double weight = 1;
        if (call.one_d) weight = call.inverted ? value(call.d, b) : 1 / value(call.d, b);
        matrices.reserve(2 * Scratch::bytes<double>(R));
        double *w = matrices.take<double>(R), *half = matrices.take<double>(R);
        const double *of_chunks = place(b) + chunks * of_C;
        for (int64_t s = 0; s < S; s++) {
            for (int64_t k = 0; k < R; k++) {
                w[k] = 0;
                for (int64_t c = 0; c < chunks; c++) w[k] += of_chunks[(c * S + s) * R + k];
                w[k] *= weight;
            }
            if (call.w) memcpy(call.w + (s * B + b) * R, w, sizeof(double) * R);
            if (call.v) VARIANT::solve(call.L_inv + b * R * R, R, w, call.v + (s * B + b) * R, half);
        }
    }

    void residual(int64_t b, int64_t g, int64_t c) const {
        const int64_t s0 = g * GROUP, s1 = least(S, s0 + GROUP);
        double *q = place(b) + chunks * (of_C + of_w) + c * S + s0;
        double *sums = place(b) + chunks * (of_C + of_w + of_q) + (c * S + s0) * R;
        if (call.in_double) leave_residual<double, double>(call, b, first(c), last(c), s0, s1, q, sums);
        else if (call.wide[b]) leave_residual<double, float>(call, b, first(c), last(c), s0, s1, q, sums);
        else leave_residual<float, float>(call, b, first(c), last(c), s0, s1, q, sums);
    }

    // q = q(v) − gᵀC⁻¹g and v ← v + C⁻¹g with g = PᵀD⁻¹r − v.
    void correct(int64_t b) const {
        matrices.reserve(2 * Scratch::bytes<double>(R));
        double *g = matrices.take<double>(R), *half = matrices.take<double>(R);
        const double *of_q_ = place(b) + chunks * (of_C + of_w), *of_g_ = of_q_ + chunks * of_q;
        for (int64_t s = 0; s < S; s++) {
            double *v = call.v + (s * B + b) * R, *step = call.step + (s * B + b) * R, q = 0;
            for (int64_t c = 0; c < chunks; c++) q += of_q_[c * S + s];
            for (int64_t k = 0; k < R; k++) {
                q += v[k] * v[k];
                g[k] = -v[k];
                for (int64_t c = 0; c < chunks; c++) g[k] += of_g_[(c * S + s) * R + k];
            }
            call.q[s * B + b] = q - VARIANT::solve(call.L_inv + b * R * R, R, g, step, half);
            for (int64_t k = 0; k < R; k++) v[k] += step[k];
        }
    }

    static double value(const Tensor &d, int64_t b) {
        double found;
        load_row(&found, d, d.at(0, b, 0), 0, 1, 1);
        return found;
    }
};

} // namespace

int64_t forward(const Forward &call) {
    const bool density = !call.given && !call.inverted && !call.gram && call.S <= 1;
    return density && of_few(call) ? forward_of_few(call) : Run(call).run();
}

} // namespace VARIANT

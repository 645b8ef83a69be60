// The update rules, written once. The equations are in fastkernels/ops/update/reference.py.
#pragma once

#include "fast/numeric.h"

namespace fast {

// Columns of the hyper table, a row per parameter group.
namespace adamw_column {
enum { lr, beta1, beta2, eps, weight_decay, anchor_decay, maximize, count };
}
namespace sgd_column {
enum { lr, momentum, dampening, nesterov, weight_decay, anchor_decay, maximize, count };
}

// A pull beyond kMaxPull leaves nothing of w. It stays finite, so that a curvature of 0 takes it
// away.
constexpr double kMaxPull = 1e30;

FAST_INLINE double pull_of(double lr, double anchor_decay) {
  const double c = lr * (anchor_decay > kMaxPull ? kMaxPull : anchor_decay);
  return c > kMaxPull ? kMaxPull : c;
}

// A rule holds what is constant over one tensor. It is derived in double and rounded once:
// 1 - 0.999f is off by 3e-5.
template <class Real>
struct AdamW {
  static constexpr int kMoments = 2;
  Real grad_scale, share, from_gradient, beta2, one_minus_beta2, inverse_correction, eps, step_size,
      decay, pull;

  AdamW() = default;

  // h: a row of the hyper table. step: counted from 1. scale: what gradients are multiplied by.
  FAST_INLINE AdamW(const double* h, double step, double scale) {
    using namespace adamw_column;
    grad_scale = h[maximize] != 0 ? -scale : scale;
    // As torch's lerp, from the end that is nearer: small gradients are not lost in a large m.
    const double beta1 = h[adamw_column::beta1];
    from_gradient = 1 - beta1 >= 0.5 ? 1 : 0;
    share = from_gradient != 0 ? -beta1 : 1 - beta1;
    beta2 = h[adamw_column::beta2];
    one_minus_beta2 = 1 - beta2;
    inverse_correction = 1 / square_root(1 - __builtin_pow(beta2, step));
    eps = h[adamw_column::eps];
    step_size = h[lr] / (1 - __builtin_pow(beta1, step));
    decay = 1 - h[lr] * h[weight_decay];
    pull = pull_of(h[lr], h[anchor_decay]);
  }

  template <class Other>
  FAST_INLINE explicit AdamW(const AdamW<Other>& r)
      : grad_scale(r.grad_scale),
        share(r.share),
        from_gradient(r.from_gradient),
        beta2(r.beta2),
        one_minus_beta2(r.one_minus_beta2),
        inverse_correction(r.inverse_correction),
        eps(r.eps),
        step_size(r.step_size),
        decay(r.decay),
        pull(r.pull) {}

  FAST_INLINE Real operator()(Real w, Real g, Real& m, Real& v) const {
    m = multiply_add(share, g - m, from_gradient != 0 ? g : m);
    v = multiply_add(beta2, v, one_minus_beta2 * (g * g));
    const Real denominator = multiply_add(square_root(v), inverse_correction, eps);
    return multiply_add(-step_size, quotient(m, denominator), w * decay);
  }
};

template <class Real>
struct Sgd {
  static constexpr int kMoments = 1;
  Real grad_scale, lr, momentum, gradient_share, direct, indirect, weight_decay, pull;

  Sgd() = default;

  FAST_INLINE Sgd(const double* h, double step, double scale) {
    using namespace sgd_column;
    const bool first = step == 1;  // the momentum starts as the gradient itself
    grad_scale = h[maximize] != 0 ? -scale : scale;
    lr = h[sgd_column::lr];
    momentum = first ? 0 : h[sgd_column::momentum];
    gradient_share = first ? 1 : 1 - h[dampening];
    direct = h[nesterov] != 0 ? 1 : 0;
    indirect = h[nesterov] != 0 ? h[sgd_column::momentum] : 1;
    weight_decay = h[sgd_column::weight_decay];
    pull = pull_of(h[sgd_column::lr], h[anchor_decay]);
  }

  template <class Other>
  FAST_INLINE explicit Sgd(const Sgd<Other>& r)
      : grad_scale(r.grad_scale),
        lr(r.lr),
        momentum(r.momentum),
        gradient_share(r.gradient_share),
        direct(r.direct),
        indirect(r.indirect),
        weight_decay(r.weight_decay),
        pull(r.pull) {}

  FAST_INLINE Real operator()(Real w, Real g, Real& b, Real&) const {
    g = multiply_add(weight_decay, w, g);
    b = multiply_add(momentum, b, gradient_share * g);
    // Not direct * g: an infinite g must not make NaN.
    const Real through = direct != 0 ? g : Real(0);
    return multiply_add(-lr, multiply_add(indirect, b, through), w);
  }

  // Without a momentum buffer.
  FAST_INLINE Real plain(Real w, Real g) const {
    return multiply_add(-lr, multiply_add(weight_decay, w, g), w);
  }
};

// The proximal step of c/2 (w - w0)^2, exact at c = 0 and at w = w0: from w on for a weak pull, and
// from w0 on for a strong one, where w may be so large that w0 is lost in it.
template <class Real>
FAST_INLINE Real pull_to(Real w, Real w0, Real c) {
  const bool strong = c > 1;
  const Real share = quotient(choose(strong, Real(-1), c), 1 + c);
  return multiply_add(share, w0 - w, strong ? w0 : w);
}

}  // namespace fast

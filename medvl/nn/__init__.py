"""Building blocks on tensors: similarities between features, token helpers, projections."""

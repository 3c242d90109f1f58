"""Names of the tensor metrics; apart from their arithmetic, because a report needs no torch."""

ERRORS = ("k_error", "v_error", "output_error", "logit_error")  # the largest is the worst
COSINES = ("k_cosine", "v_cosine", "output_cosine", "self_cosine")  # the smallest is
METRICS = (*ERRORS, *COSINES)

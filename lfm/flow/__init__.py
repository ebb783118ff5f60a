"""The probability path and its loss, time samplers, coupling, guidance, the null condition and likelihoods."""

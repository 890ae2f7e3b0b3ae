"""Looking at micro-gradients without stepping: how well they agree, and how many each tau would accept."""

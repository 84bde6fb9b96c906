"""The PPO update: it is given advantages and returns for each token, and knows nothing of how they came about."""

"""Noise and masking: schedules, samplers, and networks cut into blocks of noise levels."""

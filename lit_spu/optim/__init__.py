"""The MeZO optimizer, its noise and trajectories, and learning-rate schedules."""

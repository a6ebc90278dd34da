"""What training and the exported bundle agree on: size and rate of the video, chunks of a window, and levels."""

HEIGHT = WIDTH = 64
FPS = 24

CHUNK = 2  # latent frames that share a level
CHUNKS = 4  # noisy chunks in a full window
STEPS = 16
WARP = 2.0  # timestep warp t' = r t / (1 + (r - 1) t)

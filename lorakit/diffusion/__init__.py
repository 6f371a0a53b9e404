from lorakit.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion

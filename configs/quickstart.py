"""The quickstart model: 64 pixels, 8 views, rendered heads, small enough for a CPU.

Data:      python -m data_prep.render_heads --out data/heads64 --subjects 480 --held-out 40 --samples 2
Command:   python -m spinmeround_jax.train --config=configs/quickstart.py
Hardware:  2 CPU cores
Expected:  the autoencoder in 39 minutes (L1 0.057, LPIPS 0.023), its latents in 8, the diffusion model in 89
           (loss 0.16, still falling): weights/quickstart. README.md says how good it is.
           Trained with XLA_FLAGS=--xla_force_host_platform_device_count=2, one device for each core.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A complete `spinmeround_jax.config.Config`."""
    config = ConfigDict()
    config.name = "quickstart"
    config.seed = 0
    config.init_from = ""
    config.train_identity_encoder = True  # one small layer, learnt with the UNet
    config.compute_dtype = "float32"
    config.mesh = ConfigDict(dict(fsdp=1, views=1))
    config.remat = "nothing"
    config.accumulation = 1

    config.model = ConfigDict()
    config.model.image_size = 64
    config.model.views = 8
    config.model.rays = "true"
    config.model.latent_mean = ()  # measured when the autoencoder is trained
    config.model.latent_std = ()
    config.model.unet = ConfigDict(
        dict(
            in_channels=153,
            out_channels=8,
            model_channels=64,
            channel_mult=(1, 2),
            res_blocks=1,
            attention_levels=(0, 1),
            joint_levels=(0, 1),  # unlike the paper's: level 1 alone would have 4x4 cells
            heads=4,
            transformer_depth=1,
            context_dim=512,
            norm_groups=16,
        )
    )
    config.model.autoencoder = ConfigDict(
        dict(
            channels=16,
            channel_mult=(1, 2, 4, 4),
            res_blocks=1,
            latent_channels=4,
            scale_factor=1.0,  # the statistics are folded into the weights
            norm_groups=8,
        )
    )
    config.model.identity = ConfigDict(
        dict(
            vocab_size=7,
            width=512,
            layers=1,
            heads=8,
            mlp_width=512,
            context_length=8,
            prompt_ids=(0, 1, 2, 3, 4, 5, 6),
            empty_ids=(0, 6),
            id_token=4,
            pad_id=6,
        )
    )

    config.data = ConfigDict(
        dict(
            directory="data/heads64",
            max_frontal_yaw=35.0,
            max_frontal_pitch=25.0,
            random_background=0.2,  # the portraits of the demo are on white; the paper's share is a half
            guidance_dropout=0.1,
            relative_cameras=True,
            skip_corrupt=False,
            workers=0,
            prefetch=2,
        )
    )

    config.latents = ConfigDict(
        dict(
            directory="data/heads64/latents",  # encoded once; train writes what is missing
            backgrounds=1,
            sample=False,
        )
    )

    # ln sigma ~ N(mean + ln(targets) / 2, std^2); small latents need less noise than 64x64 ones.
    config.noise = ConfigDict(dict(mean=0.2, std=1.5))

    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-3,
            warmup_steps=100,
            schedule="cosine",
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.995,
            max_gradient_norm=1.0,
            ema_decay=0.9995,
            batch_size=4,  # more, smaller steps: on a CPU time grows with the batch
        )
    )
    config.stages = (
        ConfigDict(dict(steps=8500, observed=(1,))),
        ConfigDict(dict(steps=5000, observed=(0, 1, 1, 3))),
    )

    config.autoencoder_training = ConfigDict(
        dict(
            steps=3500,
            lpips_weight=1.0,
            kl_weight=1e-3,
            optimizer=ConfigDict(
                dict(
                    learning_rate=2e-3,
                    warmup_steps=100,
                    schedule="cosine",
                    weight_decay=0.0,
                    beta1=0.9,
                    beta2=0.99,
                    max_gradient_norm=1.0,
                    ema_decay=0.998,
                    batch_size=8,  # single views, of image and normals: 16 pictures
                )
            ),
        )
    )

    config.ablation = ConfigDict(dict(no_identity=False, no_normals=False, no_image=False))

    config.sampling = ConfigDict(
        dict(
            steps=12,
            sampler="euler",
            sigma_min=0.002,
            sigma_max=80.0,
            rho=7.0,
            guidance_scale=1.0,
            shared_noise=True,
            normals_steps=24,
            normals_guidance=1.0,
            temperature=0.0,  # a small model spreads too widely: its mean is nearer and sharper
        )
    )

    config.log_every = 50
    config.sample_every = 1000
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    return config

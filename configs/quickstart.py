"""The quickstart model: 128 pixels, 8 views, rendered heads, small enough for a CPU.

Data:      python -m data_prep.render_heads --out data/heads128 --subjects 3000 --held-out 40 --size 128 \\
               --views 125 --train-views 24 --samples 4
Command:   python -m spinmeround_jax.train --config=configs/quickstart.py
Hardware:  CPU; an example (8 views, forward and backward) is 22 GFLOP, 60,000 of them ten hours of one core
Expected:  not yet run to its end. weights/quickstart are of its predecessor: 64 pixels, 480 heads, 4 latent
           channels, normals in the head's frame, 54,000 examples
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
    config.model.image_size = 128
    config.model.views = 8
    config.model.rays = "true"
    config.model.latent_mean = ()  # measured when the autoencoder is trained
    config.model.latent_std = ()
    config.model.normals_frame = "camera"  # the release\'s are "world"
    config.model.unet = ConfigDict(
        dict(
            in_channels=177,
            out_channels=32,
            model_channels=64,
            channel_mult=(1, 2, 3),
            res_blocks=1,
            attention_levels=(1, 2),  # of 16x16 cells attention takes as long as all else together
            joint_levels=(1, 2),
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
            latent_channels=16,  # with 4, the truth came back at 25 dB
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
            directory="data/heads128",
            max_frontal_yaw=35.0,
            max_frontal_pitch=25.0,
            random_background=0.2,  # the portraits of the demo are on white; the paper's share is a half
            guidance_dropout=0.1,
            identity_dropout=0.3,  # our choice: the portrait tells more than the vector
            relative_cameras=True,
            skip_corrupt=False,
            workers=0,
            prefetch=2,
        )
    )

    config.latents = ConfigDict(
        dict(
            directory="data/heads128/latents",  # encoded once; train writes what is missing
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
            steps=5000,
            directory="data/heads128_early",  # 64 heads: as good for this, and there first
            crop=64,  # four times as many pictures for the same time
            lpips_weight=0.5,
            kl_weight=1e-4,
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

    config.held_out = ConfigDict(dict(every=500, heads=16, sigmas=(1.0, 3.0, 10.0)))
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
            temperature=1.0,
        )
    )

    config.log_every = 50
    config.sample_every = 1000
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    return config

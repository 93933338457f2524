"""3D Gaussians from views with cameras: fit, files, mesh, viewer.

gaussians   parameters, spherical harmonics, where a fit begins
rasterise   Gaussians and a camera -> image, alpha, depth, normals: JAX on every device
scene       transforms.json and its images -> views to fit
hull        the visual hull of the masks
fit         views -> Gaussians
relocation  faded Gaussians are put where others are seen
views       many views drawn, and measured
nvidia      splax in place of our rasteriser
ply         the .ply files of 3D Gaussian splatting
mesh        depth and normals -> a closed surface
viewer      Gaussians -> a page to spin them
"""

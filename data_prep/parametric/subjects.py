"""Person -> Scene: puts head, hair, clothes and light together in the world frame."""

import dataclasses

import numpy as np

from data_prep.parametric import clothes, facial_hair, hair, occlusion, skin, template
from data_prep.parametric.head import Head, build_head
from data_prep.parametric.people import Person
from data_prep.parametric.strands import Body
from data_prep.rendering import environments, render, shading


def detail_level(size: int) -> int:
    """Subdivision steps: at `size` pixels a skin edge is about one pixel long or less."""
    return 1 if size <= 128 else 2


def build_meshes(head: Head) -> list[render.Mesh]:
    """All surfaces of the subject in decimetres; the skin comes first."""
    rest = template.part("skin", head.level).rest
    face_hair = np.maximum(facial_hair.painted(head, rest), facial_hair.lash_shadow(head))
    body = Body.of(head)
    return [
        skin.skin_mesh(head, hair.painted(head, rest), face_hair, clothes.covered(head, rest)),
        *skin.eye_meshes(head),
        clothes.garment(head),
        *clothes.hat(head),
        *clothes.glasses(head),
        *facial_hair.facial_meshes(head, body),
        *hair.hair_meshes(head, body),
    ]


def light_of(person: Person) -> shading.Light:
    """The same in all views of a person: it stands still in the head's frame."""
    if person.place == "studio":
        return shading.make_light(
            person.light_azimuth, person.light_elevation, person.key_strength, person.light_warmth
        )
    place = environments.table()[person.place]
    exposure = person.key_strength * (1.05 + 0.3 * person.skin_tone)  # as a camera does on its own
    x, _, z = place.lamp
    turn = person.light_side - np.degrees(np.arctan2(x, z))
    return shading.place_light(place, turn, exposure, person.light_balance)


def build_scene(person: Person, size: int, framing: str = "canonical") -> tuple[render.Scene, Head]:
    """The renderable subject in world units, and its head (for landmarks)."""
    head = build_head(person, detail_level(size), framing)
    place = head.placement
    meshes = [
        dataclasses.replace(m, vertices=place.to_world(m.vertices)) for m in build_meshes(head)
    ]
    scene = render.Scene(meshes, light_of(person))
    _bake_light(scene, meshes, place.scale)
    return scene, head


def _bake_light(scene: render.Scene, meshes: list[render.Mesh], unit_length: float) -> None:
    """Soft shadows per vertex: on skin at the coarse vertices, on hair at every eighth."""
    count = len(scene.vertices)
    key, ambient = np.ones(count, np.float32), np.ones(count, np.float32)
    # Catmull-Clark puts the old vertices first, so these are the coarse ones, already moved.
    coarse = template.part("skin", 0).stencil.shape[0]
    for mesh, span in zip(meshes, scene.spans, strict=True):
        every = 8 if mesh.material == shading.HAIR else 1
        chosen = np.arange(0, len(mesh.vertices), every)
        if mesh.material == shading.SKIN:
            chosen = chosen[:coarse]
        directions = 40 if mesh.material in (shading.HAIR, shading.CLOTH) else occlusion.DIRECTIONS
        shares = occlusion.bake(
            scene,
            mesh.vertices[chosen],
            mesh.normals[chosen],
            (0.03 if every > 1 else 0.012) * unit_length,
            scene.light,
            directions,
        )
        for values, share in zip((key, ambient), shares, strict=True):
            if mesh.material == shading.SKIN:
                values[span] = template.refine_skin(share, span.stop - span.start)
            else:
                values[span] = share[
                    np.minimum(np.arange(len(mesh.vertices)) // every, len(share) - 1)
                ]
                if every > 1:  # light leaks between hairs, and a lock is never quite black
                    values[span] = 0.3 + 0.7 * values[span]
    scene.set_visibility(key, ambient)

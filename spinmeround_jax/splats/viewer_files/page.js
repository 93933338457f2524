// The page's own code: unpacks the splats, draws them with PlayCanvas (`pc`), orbits the camera.
// World and camera conventions are those of spinmeround_jax/cameras.py: x right, y up, the face
// looks along +z; yaw is the azimuth towards +x, pitch the elevation, both in degrees.
"use strict";
(() => {
  const root = document.documentElement;
  const canvas = document.querySelector("canvas");
  const message = document.getElementById("message");

  function fail(text) {
    message.textContent = text;
    message.hidden = false;
    root.dataset.state = "failed";
  }

  // Python writes one planar array after the other: x, y, z as float32, the rest as float16.
  function unpack(text, names, count) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    let offset = 0;
    return names.map((name) => {
      const whole = name === "x" || name === "y" || name === "z";
      const size = count * (whole ? 4 : 2);
      const part = bytes.buffer.slice(offset, offset + size);
      offset += size;
      const storage = whole ? new Float32Array(part) : Float32Array.from(new Uint16Array(part), half);
      return { type: "float", name, storage, byteSize: 4 };
    });
  }

  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  }

  function start() {
    const settings = JSON.parse(document.getElementById("settings").textContent);
    const holder = document.getElementById("splats");
    const properties = unpack(holder.textContent, settings.properties, settings.count);
    holder.remove();

    const device = new pc.WebglGraphicsDevice(canvas, { antialias: false, alpha: false });
    device.maxPixelRatio = Math.min(window.devicePixelRatio, 2);
    const options = new pc.AppOptions();
    options.graphicsDevice = device;
    options.componentSystems = [pc.CameraComponentSystem, pc.GSplatComponentSystem];
    const app = new pc.AppBase(canvas);
    app.init(options);
    app.setCanvasFillMode(pc.FILLMODE_NONE);
    app.setCanvasResolution(pc.RESOLUTION_AUTO);
    Object.assign(app.scene.gsplat, {
      dataFormat: pc.GSPLATDATA_LARGE, // colours in half floats
      colorUpdateAngle: 1, // degrees of turning after which harmonics are evaluated anew
      minPixelSize: 0, minContribution: 0, // draw what the fit drew
    });

    const camera = new pc.Entity("camera");
    camera.addComponent("camera", {
      clearColor: new pc.Color().fromString(settings.background),
      toneMapping: pc.TONEMAP_NONE,
      nearClip: settings.distance / 50,
      farClip: settings.distance * 20,
    });
    app.root.addChild(camera);
    const head = new pc.Entity("head");
    const data = new pc.GSplatData([{ name: "vertex", count: settings.count, properties }]);
    head.addComponent("gsplat", { resource: new pc.GSplatResource(device, data) });
    app.root.addChild(head);
    app.start();
    orbit(app, camera, settings);
  }

  function orbit(app, camera, settings) {
    let yaw, pitch, distance, spinning = false, drawUntil = 0;
    const spin = document.getElementById("spin");
    const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

    // The link page.html#yaw=90&pitch=10&zoom=1.5 opens at that view.
    function reset() {
      const wanted = new URLSearchParams(location.hash.slice(1));
      const read = (key, otherwise) => {
        const value = parseFloat(wanted.get(key));
        return Number.isFinite(value) ? value : otherwise;
      };
      look(read("yaw", 0), read("pitch", 0), settings.distance / read("zoom", 1));
    }

    function look(newYaw, newPitch, newDistance) {
      yaw = newYaw - 360 * Math.round(newYaw / 360);
      pitch = clamp(newPitch, -89, 89);
      distance = clamp(newDistance, settings.distance / 4, settings.distance * 4);
      camera.setLocalEulerAngles(-pitch, yaw, 0);
      const { x, y, z } = camera.forward;
      const [right, up, front] = settings.middle;
      camera.setLocalPosition(right - distance * x, up - distance * y, front - distance * z);
      root.dataset.yaw = yaw.toFixed(2);
      root.dataset.pitch = pitch.toFixed(2);
      redraw();
    }

    // Drawn only while something moves, and for a moment longer: splats are sorted in a worker.
    function redraw() {
      drawUntil = performance.now() + 500;
      app.autoRender = true;
      root.dataset.state = "drawing";
    }

    function setSpinning(on) {
      spinning = on;
      spin.setAttribute("aria-pressed", String(on));
      spin.textContent = on ? "Stop" : "Spin";
      redraw();
    }

    function resize() {
      app.resizeCanvas(canvas.clientWidth, canvas.clientHeight);
      // The smaller side spans the field of view of cameras.py.
      camera.camera.horizontalFov = canvas.clientWidth < canvas.clientHeight;
      camera.camera.fov = settings.fieldOfView;
      redraw();
    }

    let frames = 0;
    app.on("update", (seconds) => {
      if (spinning) look(yaw + 40 * Math.min(seconds, 0.1), pitch, distance);
      else if (performance.now() > drawUntil) {
        app.autoRender = false;
        root.dataset.state = "still";
      }
    });
    app.on("frameend", () => {
      root.dataset.frames = String(++frames);
      if (frames === 1) message.hidden = true;
    });

    const pointers = new Map();
    const spread = () => {
      const [a, b] = [...pointers.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      setSpinning(false);
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = pointers.get(event.pointerId);
      if (!last) return;
      const before = pointers.size === 2 ? spread() : 0;
      const dx = event.clientX - last.x, dy = event.clientY - last.y;
      last.x = event.clientX;
      last.y = event.clientY;
      if (pointers.size === 1) {
        const degrees = 180 / Math.min(canvas.clientWidth, canvas.clientHeight);
        look(yaw - dx * degrees, pitch + dy * degrees, distance);
      } else if (pointers.size === 2 && before > 0) {
        look(yaw, pitch, distance * before / Math.max(spread(), 1));
      }
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const pixels = event.deltaMode === 1 ? event.deltaY * 16 : event.deltaY;
      look(yaw, pitch, distance * Math.exp(clamp(pixels, -200, 200) * 0.001));
    }, { passive: false });

    const keys = {
      ArrowLeft: () => look(yaw + 5, pitch, distance), // as the same drag would turn the head
      ArrowRight: () => look(yaw - 5, pitch, distance),
      ArrowUp: () => look(yaw, pitch - 5, distance),
      ArrowDown: () => look(yaw, pitch + 5, distance),
      "+": () => look(yaw, pitch, distance / 1.1),
      "=": () => look(yaw, pitch, distance / 1.1),
      "-": () => look(yaw, pitch, distance * 1.1),
    };
    window.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    spin.addEventListener("click", () => setSpinning(!spinning));
    document.getElementById("reset").addEventListener("click", () => { setSpinning(false); reset(); });
    window.addEventListener("hashchange", reset);
    window.addEventListener("resize", resize);
    canvas.addEventListener("webglcontextlost", () => fail("The graphics card stopped; reload the page."));

    reset();
    resize();
  }

  try {
    start();
  } catch (error) {
    console.error(error);
    const drawable = document.createElement("canvas").getContext("webgl2");
    fail(drawable ? `This page could not start: ${error.message}`
      : "This browser offers no WebGL 2; switch on hardware acceleration, or try another browser.");
  }
})();

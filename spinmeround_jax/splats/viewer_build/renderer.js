// What viewer_files/page.js uses of the PlayCanvas engine, as the global `pc`. Built by `npm run build`.
export {
  AppBase, AppOptions, CameraComponentSystem, Color, Entity, FILLMODE_NONE, GSPLATDATA_LARGE,
  GSplatComponentSystem, GSplatData, GSplatResource, RESOLUTION_AUTO, TONEMAP_NONE,
  WebglGraphicsDevice,
} from "playcanvas";

{
  # CMakeLists.txt is the build; this lets node-gyp run it, and with node-gyp npm and prebuildify (scripts/build/prebuilds.mjs).
  "variables": { "build_script%": "build:native" },  # of package.json; GYP_DEFINES="build_script=..." chooses another
  "targets": [
    {
      "target_name": "aligngpt",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake-js",
          "inputs": ["CMakeLists.txt"],
          "outputs": ["<(PRODUCT_DIR)/aligngpt.node"],
          "action": ["npm", "run", "<(build_script)"]
        }
      ]
    }
  ]
}
